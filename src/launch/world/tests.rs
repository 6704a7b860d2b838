//! Tables of variables as the launchers set them.

use super::*;
use crate::error::Kind;
use std::path::PathBuf;

/// `"A=1 B=x"` as an environment.
fn world(variables: &str) -> Result<World> {
    let pairs: Vec<(&str, &str)> = variables.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
    World::from_env(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
}

fn node(job: &str) -> Meeting {
    Meeting::Node { job: Some(job.to_string()) }
}

fn tcp(host: &str, port: u16) -> Meeting {
    of_job(host, port, "")
}

fn of_job(host: &str, port: u16, job: &str) -> Meeting {
    Meeting::Tcp { host: host.to_string(), ports: vec![port], job: job.to_string() }
}

#[test]
fn every_launcher_is_understood() {
    use Launcher::{Flux, Hydra, Lockstep, Mvapich, OpenMpi, Pals, Slurm, Torchrun};
    let here = Meeting::Node { job: None };
    let table = [
        ("", (0, 1, 0, 1), Launcher::None, Meeting::Alone),
        (
            "LOCKSTEP_RANK=1 LOCKSTEP_SIZE=4 LOCKSTEP_LOCAL_RANK=1 LOCKSTEP_LOCAL_SIZE=4",
            (1, 4, 1, 4),
            Lockstep,
            Meeting::Inherited,
        ),
        (
            "RANK=3 WORLD_SIZE=4 LOCAL_RANK=3 LOCAL_WORLD_SIZE=4 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500",
            (3, 4, 3, 4),
            Torchrun,
            node("127.0.0.1:29500"),
        ),
        (
            "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=n0 MASTER_PORT=29500",
            (3, 4, 1, 2),
            Torchrun,
            tcp("n0", 29500),
        ),
        (
            "RANK=3 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=n0 MASTER_PORT=29500 TORCHELASTIC_USE_AGENT_STORE=True",
            (3, 4, 1, 2),
            Torchrun,
            tcp("n0", 29501),
        ),
        // By hand, without local variables: taken as one rank a node.
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=n0 MASTER_PORT=29500", (1, 2, 0, 1), Torchrun, tcp("n0", 29500)),
        // Open MPI 4 sets PMIX_NAMESPACE as a number, 5 as a name; both set PMIX_RANK, which Slurm's plugin sets too.
        (
            "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 OMPI_COMM_WORLD_LOCAL_SIZE=2 \
             PMIX_RANK=1 PMIX_NAMESPACE=3204448257",
            (1, 2, 1, 2),
            OpenMpi,
            node("3204448257"),
        ),
        (
            "OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=2 \
             PMIX_NAMESPACE=prterun-n0-2718@1 MASTER_ADDR=n0 MASTER_PORT=4000",
            (2, 4, 0, 2),
            OpenMpi,
            of_job("n0", 4000, "prterun-n0-2718@1"),
        ),
        (
            "MV2_COMM_WORLD_RANK=1 MV2_COMM_WORLD_SIZE=2 MV2_COMM_WORLD_LOCAL_RANK=1 MV2_COMM_WORLD_LOCAL_SIZE=2 \
             PMI_RANK=1 PMI_SIZE=2",
            (1, 2, 1, 2),
            Mvapich,
            here.clone(),
        ),
        ("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2", (1, 2, 1, 2), Hydra, here),
        (
            "PMI_RANK=1 PMI_SIZE=2 PMI_FD=6 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2",
            (1, 2, 1, 2),
            Hydra,
            Meeting::Pmi { fd: 6, one_node: true },
        ),
        (
            "PALS_RANKID=5 PMI_RANK=5 PMI_SIZE=8 PALS_LOCAL_RANKID=1 PALS_LOCAL_SIZE=4 PALS_APID=a1 MASTER_ADDR=x1 MASTER_PORT=29500",
            (5, 8, 1, 4),
            Pals,
            of_job("x1", 29500, "a1"),
        ),
        (
            "FLUX_TASK_RANK=1 FLUX_JOB_SIZE=2 FLUX_TASK_LOCAL_ID=1 FLUX_JOB_NNODES=1 FLUX_JOB_ID=f1 PMI_RANK=1 PMI_SIZE=2",
            (1, 2, 1, 2),
            Flux,
            node("f1"),
        ),
        (
            "FLUX_TASK_RANK=5 FLUX_JOB_SIZE=7 FLUX_TASK_LOCAL_ID=4 FLUX_JOB_NNODES=2 MASTER_ADDR=n MASTER_PORT=1",
            (5, 7, 4, 5),
            Flux,
            tcp("n", 1),
        ),
        (
            "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_STEP_NUM_TASKS=2 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=1 SLURM_JOB_ID=77 \
             SLURM_STEP_ID=0 SLURM_STEP_NODELIST=n0",
            (1, 2, 1, 2),
            Slurm,
            node("77.0"),
        ),
        (
            "SLURM_PROCID=5 SLURM_NTASKS=8 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=n[0-1] MASTER_ADDR=n0 MASTER_PORT=29500",
            (5, 8, 1, 4),
            Slurm,
            tcp("n0", 29500),
        ),
        (
            "SLURM_PROCID=5 SLURM_NTASKS=6 SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=n[0-1] SLURM_NODEID=1 \
             SLURM_STEP_TASKS_PER_NODE=5,1 SLURM_JOB_ID=77 SLURM_STEP_ID=1 MASTER_PORT=4000",
            (5, 6, 0, 1),
            Slurm,
            of_job("n0", 4000, "77.1"),
        ),
        // The list is the whole job's, the step is smaller: halves of the step are all that is known.
        (
            "SLURM_PROCID=3 SLURM_STEP_NUM_TASKS=4 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=n[0-1] \
             SLURM_NODEID=1 SLURM_TASKS_PER_NODE=8(x4) MASTER_ADDR=n0 MASTER_PORT=29500",
            (3, 4, 1, 2),
            Slurm,
            tcp("n0", 29500),
        ),
        // The shell of an interactive step: the job has four tasks, the step one.
        (
            "SLURM_PROCID=0 SLURM_NTASKS=4 SLURM_STEP_NUM_TASKS=1 SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=n0",
            (0, 1, 0, 1),
            Slurm,
            Meeting::Alone,
        ),
        // A batch script is no step.
        ("SLURM_PROCID=0 SLURM_NTASKS=8 SLURM_LOCALID=0 SLURM_JOB_ID=77", (0, 1, 0, 1), Launcher::None, Meeting::Alone),
    ];
    for (variables, (rank, size, local_rank, local_size), launcher, meeting) in table {
        // A build with MPI meets through that.
        #[cfg(feature = "mpi")]
        let meeting = match meeting {
            Meeting::Node { .. } | Meeting::Pmi { .. } if launcher.starts_mpi() => Meeting::Mpi { one_node: true },
            meeting => meeting,
        };
        let joins_output = launcher != Torchrun;
        let expected = World { rank, size, local_rank, local_size, launcher, joins_output, meeting };
        assert_eq!(world(variables).unwrap(), expected, "{variables}");
    }
}

/// mpirun in a Slurm job starts its daemons, one a node, as a step, and the ranks inherit the daemon's variables.
#[test]
fn what_slurm_says_of_mpiruns_daemons_does_not_count() {
    let slurm = "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=n[0-1]";
    let mpi = "OMPI_COMM_WORLD_RANK=6 OMPI_COMM_WORLD_SIZE=8 OMPI_COMM_WORLD_LOCAL_RANK=2 OMPI_COMM_WORLD_LOCAL_SIZE=4";
    let world = world(&format!("{slurm} {mpi} MASTER_ADDR=n0 MASTER_PORT=29500")).unwrap();
    assert_eq!((world.rank, world.size, world.local_rank, world.local_size), (6, 8, 2, 4));
    assert_eq!(world.launcher, Launcher::OpenMpi);
}

#[test]
fn what_slurm_says_of_several_tasks_of_which_each_is_a_world_of_its_own_does_count() {
    let slurm = "SLURM_PROCID=2 SLURM_NTASKS=4 SLURM_LOCALID=2 SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=n0";
    let error = world(&format!("{slurm} OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=1")).unwrap_err().to_string();
    assert!(error.contains("every task of this Slurm step would train alone: OMPI_COMM_WORLD_SIZE = 1"), "{error}");
    assert!(error.contains("--mpi=pmix"), "{error}");
}

#[test]
fn a_place_to_meet_is_found_without_a_fixed_port() {
    let slurm = "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_LOCALID=0 SLURM_NODEID=1 SLURM_STEP_TASKS_PER_NODE=1(x2) \
                 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=n[07-08] SLURM_JOB_ID=77";
    let ports_of = |step: usize| match world(&format!("{slurm} SLURM_STEP_ID={step}")).unwrap().meeting {
        Meeting::Tcp { host, ports, .. } if host == "n07" => ports,
        other => panic!("{other:?}"),
    };
    assert_eq!(ports_of(3), ports_of(3));
    assert_eq!(ports_of(3).len(), 12);
    assert!(ports_of(3).iter().all(|port| (20_000..30_000).contains(port)));
    assert_ne!(ports_of(3), ports_of(4), "two steps of a job do not get in each other's way");

    let two = "RANK=1 WORLD_SIZE=2";
    let folder = Meeting::Folder { folder: PathBuf::from("/shared/x"), job: String::new() };
    assert_eq!(world(&format!("{two} LOCKSTEP_RENDEZVOUS=file:/shared/x")).unwrap().meeting, folder);
    let error = world(&format!("{two} LOCKSTEP_RENDEZVOUS=file:x")).unwrap_err().to_string();
    assert!(error.contains("the absolute path of a folder"), "{error}");

    let hydra = "PMI_RANK=1 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2";
    assert_eq!(world(&format!("{hydra} PMI_FD=7")).unwrap().meeting, Meeting::Pmi { fd: 7, one_node: false });
    assert_eq!(world(&format!("{hydra} PMI_FD=7 MASTER_ADDR=a MASTER_PORT=1")).unwrap().meeting, tcp("a", 1));
}

#[test]
fn a_world_that_mpi_sees_otherwise_is_refused_with_the_flag_that_mends_it() {
    let slurm = "SLURM_PROCID=1 SLURM_NTASKS=4 SLURM_LOCALID=1 SLURM_STEP_NUM_NODES=1 SLURM_STEP_NODELIST=n0";
    for (variables, mpi, words) in [
        (slurm, (0, 1), &["rank 1 of 4, but MPI (Open MPI v4.1.4) sees rank 0 of 1", "srun --mpi=pmix"][..]),
        ("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALNRANKS=2 MPI_LOCALRANKID=1", (0, 1), &["use the mpirun of the MPI"]),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2", (0, 2), &["sees rank 0 of 2: use one launcher"]),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2", (0, 1), &["[parallel] transport"]),
    ] {
        let error = world(variables).unwrap().check_mpi(mpi.0, mpi.1, "Open MPI v4.1.4\npackage: x").unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        words.iter().for_each(|words| assert!(error.to_string().contains(words), "{error}"));
    }
    assert!(world(slurm).unwrap().check_mpi(1, 4, "").is_ok());
    assert!(World::alone().check_mpi(1, 2, "").is_ok(), "a launcher that only MPI knows");
}

#[test]
fn what_is_wrong_is_named() {
    let table: [(&str, &[&str]); 11] = [
        (
            "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 RANK=0 WORLD_SIZE=2",
            &["RANK = 0 (torchrun)", "OMPI_COMM_WORLD_RANK = 1 (Open MPI)", "left over"],
        ),
        ("PMI_RANK=0 PMI_SIZE=2 WORLD_SIZE=4 RANK=0", &["WORLD_SIZE = 4", "PMI_SIZE = 2"]),
        (
            "PMI_RANK=1 PMI_SIZE=4 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=4 RANK=1 WORLD_SIZE=4 LOCAL_RANK=0 LOCAL_WORLD_SIZE=4",
            &["LOCAL_RANK = 0", "MPI_LOCALRANKID = 1"],
        ),
        ("RANK=2 WORLD_SIZE=2", &["RANK = 2 is not below WORLD_SIZE = 2"]),
        ("RANK=-1 WORLD_SIZE=2", &["RANK = \"-1\" is not a number"]),
        ("RANK=1", &["RANK = 1 is set but WORLD_SIZE is not"]),
        ("RANK=1 WORLD_SIZE=2 LOCAL_RANK=2 LOCAL_WORLD_SIZE=2", &["local rank 2 of 2"]),
        (
            "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=0 OMPI_COMM_WORLD_LOCAL_SIZE=1",
            &["Open MPI started 2 ranks", "LOCKSTEP_RENDEZVOUS=file:", "MASTER_ADDR", "mpirun -x", "--features mpi"],
        ),
        (
            "SLURM_PROCID=1 SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=n[1 SLURM_JOB_ID=7 SLURM_STEP_ID=0",
            &["SLURM_STEP_NODELIST = \"n[1\"", "as Slurm writes them"],
        ),
        ("PMI_RANK=1 PMI_SIZE=2 PMI_FD=x", &["PMI_FD = \"x\" is not a descriptor"]),
        ("RANK=1 WORLD_SIZE=2 MASTER_ADDR=n0 MASTER_PORT=99999", &["MASTER_PORT = \"99999\" is not a port"]),
    ];
    for (variables, expected) in table {
        let error = world(variables).expect_err(variables);
        assert_eq!(error.kind(), Kind::Usage, "{variables}");
        for words in expected {
            assert!(error.to_string().contains(words), "{variables}: {error}");
        }
    }
}

#[test]
fn ranks_of_a_launcher_of_ours_do_not_see_the_others() {
    let cleared: Vec<&str> = foreign_variables().collect();
    for name in ["RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "PMI_SIZE", "FLUX_JOB_NNODES"] {
        assert!(cleared.contains(&name), "{name}");
    }
    assert!(!cleared.iter().any(|name| name.starts_with("LOCKSTEP") || name.starts_with("SLURM")));
}
