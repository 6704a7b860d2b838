//! The mpirun of this machine under which tests start ranks.

use lockstep::comm::mpi_library;
use std::process::Command;

/// An mpirun, and the arguments without which it refuses what tests do.
pub struct Mpirun {
    pub program: String,
    pub arguments: &'static [&'static str],
}

impl Mpirun {
    /// One that fits this build; any fits a build without the feature.
    pub fn find() -> Option<Mpirun> {
        let library = mpi_library();
        let named = std::env::var("MPIRUN").ok();
        let names = named.as_deref().map_or(vec!["mpirun", "mpirun.openmpi", "mpirun.mpich"], |named| vec![named]);
        let found = names.iter().find_map(|name| {
            let version = Command::new(name).arg("--version").output().ok()?;
            let version = String::from_utf8_lossy(&version.stdout).into_owned();
            // The second where it is called by another name than mpirun.
            let open_mpi = version.contains("Open MPI") || version.contains("OpenRTE");
            let fits = library.as_ref().is_none_or(|library| library.contains("Open MPI") == open_mpi);
            let arguments: &[&str] = if open_mpi { &["--oversubscribe"] } else { &[] };
            fits.then(|| Mpirun { program: name.to_string(), arguments })
        });
        if found.is_none() {
            skip(&format!("no mpirun{}", library.map_or(String::new(), |library| format!(" of {library}"))));
        }
        found
    }

    pub fn of_this_build() -> Option<Mpirun> {
        match mpi_library() {
            Some(_) => Mpirun::find(),
            None => {
                skip("built without MPI");
                None
            }
        }
    }

    pub fn command(&self, ranks: usize) -> Command {
        let mut command = Command::new(&self.program);
        // Open MPI refuses to serve root, who may be all there is in a container.
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        command.args(self.arguments).args(["-np", &ranks.to_string()]);
        command
    }
}

pub fn skip(why: &str) {
    eprintln!("skipped: {why}");
}
