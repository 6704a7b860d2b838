//! Choices that were made by timing, on disk: `lockstep/choices` in the user's cache, a file each. The first one that is
//! made for a key stands, whoever makes it, so that all ranks of a host, and later runs, make the same one.

use super::kernels::cache_folder;
use super::probe::Device;
use std::fmt::Display;
use std::fs;
use std::io::{self, ErrorKind, Write};
use std::path::Path;

/// Of what choices are written as, and of what decides between them: those of another number are not looked at.
const FORMAT: u32 = 2;

/// What was chosen for the key.
pub fn read(key: &str) -> Option<String> {
    cache_folder("choices").and_then(|folder| read_in(&folder, &formatted(key)))
}

/// Keeps a choice unless there is one that is usable; gives the one that stands. Where nothing can be kept, it is the new one.
pub fn keep_first(key: &str, choice: &str, usable: impl Fn(&str) -> bool) -> String {
    let Some(folder) = cache_folder("choices") else { return choice.to_owned() };
    match keep_first_in(&folder, &formatted(key), choice, usable) {
        Ok(standing) => standing,
        Err(error) => {
            tracing::debug!("what was chosen by timing is not kept in {}: {error}", folder.display());
            choice.to_owned()
        }
    }
}

/// The file has the key in its first line, for whoever looks, and the choice in its second.
fn read_in(folder: &Path, key: &str) -> Option<String> {
    let text = fs::read_to_string(folder.join(file_name(key))).ok()?;
    let (found, choice) = text.split_once('\n')?;
    (found == key).then(|| choice.strip_suffix('\n').map(str::to_owned))?
}

fn keep_first_in(folder: &Path, key: &str, choice: &str, usable: impl Fn(&str) -> bool) -> io::Result<String> {
    fs::create_dir_all(folder)?;
    let path = folder.join(file_name(key));
    for _ in 0..2 {
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        writeln!(file, "{key}\n{choice}")?;
        match file.persist_noclobber(&path) {
            Ok(_) => return Ok(choice.to_owned()),
            Err(error) if error.error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.error),
        }
        if let Some(standing) = read_in(folder, key).filter(|standing| usable(standing)) {
            return Ok(standing);
        }
        // It is damaged, or of no use any more. Another rank may have found that too.
        fs::remove_file(&path)
            .or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) })?;
    }
    Ok(choice.to_owned())
}

/// The warning where there is no memory to time several `of` for `what`.
pub fn untimed(device: &Device, what: &dyn Display, of: &str) -> String {
    format!(
        "{device} has no memory free to time what computes {what}: {of} with the least workspace is taken, which may be slow, and \
         of other bits than in a run that has timed"
    )
}

fn formatted(key: &str) -> String {
    format!("format {FORMAT}, {key}")
}

fn file_name(key: &str) -> String {
    blake3::hash(key.as_bytes()).to_hex().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_choice_stands_until_its_file_is_damaged_or_it_is_of_no_use() {
        let folder = tempfile::tempdir().unwrap();
        let keep = |key: &str, choice: &str| keep_first_in(folder.path(), key, choice, |_| true).unwrap();
        assert_eq!(read_in(folder.path(), "a"), None);
        assert_eq!([keep("a", "eng1"), keep("a", "eng2"), keep("b", "eng3")], ["eng1", "eng1", "eng3"]);
        assert_eq!(read_in(folder.path(), "a").as_deref(), Some("eng1"));
        for damaged in ["", "a", "a\neng1", "another key\neng1\n"] {
            fs::write(folder.path().join(file_name("a")), damaged).unwrap();
            assert_eq!(read_in(folder.path(), "a"), None, "{damaged:?}");
            assert_eq!(keep("a", "eng4"), "eng4");
            assert_eq!(keep("a", "eng5"), "eng4");
        }
        let replaced = keep_first_in(folder.path(), "a", "eng6", |standing| standing != "eng4").unwrap();
        assert_eq!((&*replaced, &*keep("a", "eng7")), ("eng6", "eng6"));
    }
}
