//! Files that are there whole or not at all: written without a name, flushed to the disk, named, and the folder flushed.
//! A process killed in the middle leaves the old file as it was and, where the file system can keep nameless files, nothing
//! else; where it cannot, a temporary file that the next write into the folder clears away. A folder has one writer, the
//! run's rank 0.

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::Path;

const TEMPORARY: &str = ".next.lockstep-tmp";

/// Makes or replaces `path`, creating its folder.
pub fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let temporary = folder.join(TEMPORARY);
    clear(&temporary)?;
    let replaced = write(folder, &temporary, path, contents);
    if replaced.is_err() {
        clear(&temporary)?;
    }
    replaced?;
    File::open(folder)?.sync_all()
}

/// A new file gets its name when it is whole. One that replaces another needs a second name to be renamed from, since a
/// link cannot take another's place.
fn write(folder: &Path, temporary: &Path, path: &Path, contents: &[u8]) -> io::Result<()> {
    let nameless = open(folder, OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC, Mode::from_raw_mode(0o666));
    let (mut file, named) = match nameless {
        Ok(file) => (File::from(file), false),
        Err(_) => (File::create(temporary)?, true),
    };
    file.write_all(contents)?;
    file.sync_all()?;
    if !named {
        let name =
            |to: &Path| linkat(CWD, format!("/proc/self/fd/{}", file.as_raw_fd()), CWD, to, AtFlags::SYMLINK_FOLLOW);
        match name(path) {
            Err(Errno::EXIST) => name(temporary)?,
            named => return Ok(named?),
        }
    }
    fs::rename(temporary, path)
}

fn clear(temporary: &Path) -> io::Result<()> {
    match fs::remove_file(temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

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
        fs::write(folder.path().join(TEMPORARY), "half").unwrap();
        replace(&folder.path().join("a"), b"whole").unwrap();
        assert_eq!(names(folder.path()), ["a"]);
    }
}
