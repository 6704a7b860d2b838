//! Tables of variables as the launchers set them.

use super::*;

/// `"A=1 B=x"` as an environment.
fn world(variables: &str) -> Result<World> {
    let pairs: Vec<(&str, &str)> = variables.split_whitespace().filter_map(|pair| pair.split_once('=')).collect();
    World::from_env(|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_string()))
}

fn node(job: &str) -> Meeting {
    Meeting::Node { job: Some(job.to_string()) }
}

fn tcp(host: &str, port: u16) -> Meeting {
    Meeting::Tcp { host: host.to_string(), port }
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
            here.clone(),
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
            tcp("n0", 4000),
        ),
        (
            "MV2_COMM_WORLD_RANK=1 MV2_COMM_WORLD_SIZE=2 MV2_COMM_WORLD_LOCAL_RANK=1 MV2_COMM_WORLD_LOCAL_SIZE=2 \
             PMI_RANK=1 PMI_SIZE=2",
            (1, 2, 1, 2),
            Mvapich,
            here.clone(),
        ),
        ("PMI_RANK=1 PMI_SIZE=2 PMI_FD=6 MPI_LOCALRANKID=1 MPI_LOCALNRANKS=2", (1, 2, 1, 2), Hydra, here),
        (
            "PALS_RANKID=5 PMI_RANK=5 PMI_SIZE=8 PALS_LOCAL_RANKID=1 PALS_LOCAL_SIZE=4 PALS_APID=a1 MASTER_ADDR=x1 MASTER_PORT=29500",
            (5, 8, 1, 4),
            Pals,
            tcp("x1", 29500),
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
        let expected = World { rank, size, local_rank, local_size, launcher, meeting };
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
fn what_is_wrong_is_named() {
    let table: [(&str, &[&str]); 9] = [
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
        ("PMI_RANK=1 PMI_SIZE=2 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=1", &["MASTER_ADDR", "MASTER_PORT", "2 ranks"]),
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
