//! The mpirun of this machine under which tests start ranks.

use lockstep::comm::mpi_library;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

/// An mpirun, and the arguments without which it refuses what tests do.
pub struct Mpirun {
    pub program: String,
    pub arguments: &'static [&'static str],
}

impl Mpirun {
    /// One of each MPI of this machine that fits this build; any fits a build without the feature. $MPIRUN alone, if set.
    pub fn all() -> Vec<Mpirun> {
        let library = mpi_library();
        let named = std::env::var("MPIRUN").ok();
        let names = named.as_deref().map_or(vec!["mpirun", "mpirun.openmpi", "mpirun.mpich"], |named| vec![named]);
        let mut found: Vec<Mpirun> = names.into_iter().filter_map(Mpirun::named).collect();
        found.retain(|mpirun| {
            library.as_ref().is_none_or(|library| library.contains("Open MPI") == mpirun.is_open_mpi())
        });
        // One of these is `mpirun` too.
        found.sort_by_key(Mpirun::is_open_mpi);
        found.dedup_by_key(|mpirun| mpirun.is_open_mpi());
        if found.is_empty() {
            skip(&format!("no mpirun{}", library.map_or(String::new(), |library| format!(" of {library}"))));
        }
        found
    }

    fn named(name: &str) -> Option<Mpirun> {
        let version = Command::new(name).arg("--version").output().ok()?;
        let version = String::from_utf8_lossy(&version.stdout).into_owned();
        // The second where it is called by another name than mpirun.
        let open_mpi = version.contains("Open MPI") || version.contains("OpenRTE");
        Some(Mpirun { program: name.to_string(), arguments: if open_mpi { &["--oversubscribe"] } else { &[] } })
    }

    fn is_open_mpi(&self) -> bool {
        !self.arguments.is_empty()
    }

    pub fn of_this_build() -> Option<Mpirun> {
        match mpi_library() {
            Some(_) => Mpirun::all().pop(),
            None => {
                skip("built without MPI");
                None
            }
        }
    }

    pub fn command(&self, ranks: usize) -> Command {
        let mut command = self.prepared(Command::new(&self.program));
        command.args(self.arguments).args(["-np", &ranks.to_string()]);
        command
    }

    /// A folder, which is made, and $PATH with it in front, in which `mpirun` is this one and `trainer` that program.
    pub fn path_with(&self, folder: &Path, trainer: &str) -> String {
        fs::create_dir_all(folder).unwrap();
        std::os::unix::fs::symlink(trainer, folder.join("trainer")).unwrap();
        let path = std::env::var("PATH").unwrap();
        // By its place, for its name may be that of the script.
        let program = std::env::split_paths(&path).map(|folder| folder.join(&self.program)).find(|file| file.is_file());
        let script = format!("#!/bin/sh\nexec {} {} \"$@\"\n", program.unwrap().display(), self.arguments.join(" "));
        fs::write(folder.join("mpirun"), script).unwrap();
        fs::set_permissions(folder.join("mpirun"), fs::Permissions::from_mode(0o755)).unwrap();
        format!("{}:{path}", folder.display())
    }

    /// With what Open MPI needs to serve root, who may be all there is in a container.
    pub fn prepared(&self, mut command: Command) -> Command {
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        command
    }
}

pub fn skip(why: &str) {
    eprintln!("skipped: {why}");
}
