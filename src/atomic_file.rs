//! Files that are there whole or not at all: written without a name, flushed to the disk, named, and the folder flushed.
//! A process killed in the middle leaves the old file as it was and, where the file system can keep nameless files, nothing
//! else; where it cannot, a temporary file that the next write of the same file clears away. A file has one writer at a
//! time; where the ranks of several machines make the same file, they write the same into it.

use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
use rustix::io::Errno;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

/// Makes or replaces `path`, creating its folder.
pub fn replace(path: &Path, contents: &[u8]) -> io::Result<()> {
    let mut file = NewFile::create(folder_of(path), &path.file_name().unwrap_or_default().to_string_lossy())?;
    file.write_all(contents)?;
    file.name(path)?;
    File::open(folder_of(path))?.sync_all()
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// A file that is being written and has no name yet. Dropped without one, it is gone.
pub struct NewFile {
    file: File,
    /// Where it is until it has its name, if it could not be made without one; else its way to replace another file.
    temporary: PathBuf,
    named: bool,
}

impl NewFile {
    /// In a folder, which is created. `mark` tells it apart from others that are being written there.
    pub fn create(folder: &Path, mark: &str) -> io::Result<NewFile> {
        fs::create_dir_all(folder)?;
        let temporary = folder.join(format!(".{mark}.lockstep-tmp"));
        clear(&temporary)?;
        let nameless = open(folder, OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC, Mode::from_raw_mode(0o666));
        Ok(match nameless {
            Ok(file) => NewFile { file: File::from(file), temporary, named: false },
            Err(_) => NewFile { file: File::create(&temporary)?, temporary, named: true },
        })
    }

    /// Flushes it to the disk and gives it its name, which may be another file's until now. The folder is not flushed.
    ///
    /// A new file gets its name at once. One that replaces another needs a second name to be renamed from, since a link
    /// cannot take another's place.
    pub fn name(mut self, path: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        if !self.named {
            let nameless = format!("/proc/self/fd/{}", self.file.as_raw_fd());
            let name = |to: &Path| linkat(CWD, &nameless, CWD, to, AtFlags::SYMLINK_FOLLOW);
            match name(path) {
                Err(Errno::EXIST) => name(&self.temporary)?,
                named => return Ok(named?),
            }
            self.named = true;
        }
        fs::rename(&self.temporary, path)?;
        self.named = false;
        Ok(())
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if self.named {
            // The next write of the same file tries again.
            let _ = clear(&self.temporary);
        }
    }
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
    fn a_file_without_its_name_is_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let mut files = [1, 2].map(|mark| NewFile::create(folder.path(), &mark.to_string()).unwrap());
        files.iter_mut().zip([b"one", b"two"]).for_each(|(file, text)| file.write_all(text).unwrap());
        let [first, second] = files;
        drop(first);
        second.name(&folder.path().join("b")).unwrap();
        assert_eq!(names(folder.path()), ["b"]);
        assert_eq!(fs::read(folder.path().join("b")).unwrap(), b"two");
    }

    #[test]
    fn the_leftover_of_a_killed_write_is_cleared_by_the_next() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".a.lockstep-tmp"), "half").unwrap();
        replace(&folder.path().join("a"), b"whole").unwrap();
        assert_eq!(names(folder.path()), ["a"]);
    }
}
