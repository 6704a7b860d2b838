//! Files that are there whole or not at all: written under a temporary name in the same folder, flushed to the disk,
//! renamed, and the folder flushed. A process killed in the middle leaves the old file as it was, and a temporary one
//! that the next write into the folder clears away. A folder has one writer, the run's rank 0.

use std::fs::{self, File, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

const TEMPORARY: &str = ".lockstep-tmp";

/// Makes or replaces `path`, creating its folder.
pub fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    clear_leftovers(folder)?;
    // tempfile makes private files; these are meant to be as readable as any other output.
    let mut file = tempfile::Builder::new()
        .prefix(".")
        .suffix(TEMPORARY)
        .permissions(Permissions::from_mode(0o666))
        .tempfile_in(folder)?;
    file.write_all(contents)?;
    file.as_file().sync_all()?;
    file.persist(path).map_err(|failed| failed.error)?;
    File::open(folder)?.sync_all()
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
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn a_file_is_replaced_whole_and_a_failure_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/summary.json");
        replace(&path, b"old and longer").unwrap();
        replace(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        let plain = folder.path().join("plain");
        fs::write(&plain, b"").unwrap();
        let mode = |path| fs::metadata(path).unwrap().permissions().mode();
        assert_eq!(mode(&path), mode(&plain), "as readable as any file");

        let occupied = folder.path().join("new/folder");
        fs::create_dir(&occupied).unwrap();
        assert!(replace(&occupied, b"cannot take a folder's name").is_err());
        assert_eq!(names(path.parent().unwrap()), ["folder", "summary.json"]);
    }

    #[test]
    fn the_leftover_of_a_killed_write_is_cleared_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".Ab3xyz.lockstep-tmp"), "half").unwrap();
        replace(&folder.path().join("a"), b"whole").unwrap();
        assert_eq!(names(folder.path()), ["a"]);
    }
}
