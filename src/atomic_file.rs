//! Files that are there whole or not at all: written under a temporary name in the same folder, flushed to the disk,
//! renamed, and the folder flushed. A process killed in the middle leaves the old file as it was, and a temporary one
//! that the next write into the folder clears away. A folder has one writer, the run's rank 0.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const TEMPORARY: &str = ".lockstep-tmp";

/// Makes or replaces `path`, creating its folder; `write` is given the temporary path to write to.
pub fn replace<E: From<io::Error>>(path: &Path, write: impl FnOnce(&Path) -> Result<(), E>) -> Result<(), E> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    clear_leftovers(folder)?;
    // tempfile makes private files; these are meant to be as readable as any other output.
    let file = tempfile::Builder::new()
        .prefix(".")
        .suffix(TEMPORARY)
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)?;
    write(file.path())?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|failed| failed.error)?;
    Ok(File::open(folder)?.sync_all()?)
}

fn clear_leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().ends_with(TEMPORARY) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/summary.json");
        replace(&path, |to| fs::write(to, "old")).unwrap();
        let failed = replace(&path, |to| {
            fs::write(to, "half of the n")?;
            Err(io::Error::other("the disk is full"))
        });
        assert_eq!(failed.unwrap_err().to_string(), "the disk is full");
        assert_eq!(fs::read_to_string(&path).unwrap(), "old");
        assert_eq!(names(path.parent().unwrap()), ["summary.json"]);
    }

    #[test]
    fn the_leftover_of_a_killed_write_is_cleared_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".Ab3xyz.lockstep-tmp"), "half").unwrap();
        replace(&folder.path().join("a"), |to| fs::write(to, "whole")).unwrap();
        assert_eq!(names(folder.path()), ["a"]);
    }
}
