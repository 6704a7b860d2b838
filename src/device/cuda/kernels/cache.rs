//! Compiled kernels on disk, `lockstep/kernels` in the user's cache. A file's name is the hash of all that its code depends on,
//! so it is never out of date; its first 32 bytes are the hash of the rest, so that a damaged one is noticed and made anew.
//! Without a cache that can be written, each process compiles for itself.

use super::compile::{compile, options};
use super::{Element, HEADERS, Source};
use crate::atomic_file;
use crate::device::cuda::libraries::Version;
use crate::error::Result;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};

const HASH_BYTES: usize = blake3::OUT_LEN;

/// The code of a source, from the cache or else compiled, and then kept there.
pub fn cubin(source: &Source, element: Element, architecture: &str, nvrtc: Version) -> Result<Vec<u8>> {
    let key = key(source, element, architecture, nvrtc);
    cached(cache_folder("kernels").as_deref(), &key, || compile(source, element, architecture))
}

fn cached(folder: Option<&Path>, key: &str, compile: impl FnOnce() -> Result<Vec<u8>>) -> Result<Vec<u8>> {
    let Some(folder) = folder else {
        tracing::debug!("compiled kernels are not kept: neither XDG_CACHE_HOME nor HOME is set");
        return compile();
    };
    let path = folder.join(format!("{key}.cubin"));
    if let Some(cubin) = read(&path) {
        return Ok(cubin);
    }
    let cubin = compile()?;
    let contents = [blake3::hash(&cubin).as_bytes(), &cubin[..]].concat();
    // Several ranks may write the same file; that one of them fails then does no harm.
    if let Err(error) = atomic_file::replace(&path, &contents) {
        tracing::debug!("compiled kernels are not kept in {}: {error}", path.display());
    }
    Ok(cubin)
}

/// None if there is no such file, or it is not what was written.
fn read(path: &Path) -> Option<Vec<u8>> {
    let mut contents = fs::read(path).ok()?;
    let cubin = contents.split_off(contents.len().min(HASH_BYTES));
    if contents != blake3::hash(&cubin).as_bytes() {
        tracing::debug!("{} is damaged: its kernels are compiled again", path.display());
        return None;
    }
    Some(cubin)
}

/// The hash of all that the code depends on.
fn key(source: &Source, element: Element, architecture: &str, nvrtc: Version) -> String {
    let mut hash = blake3::Hasher::new();
    let mut part = |text: &str| _ = hash.update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    part(source.text);
    HEADERS.iter().for_each(|(_, text)| part(text));
    options(element, architecture).iter().for_each(|option| part(option));
    part(&nvrtc.to_string());
    format!("{}-{}", source.name, hash.finalize().to_hex())
}

/// The folder of this name in the user's cache.
pub fn cache_folder(name: &str) -> Option<PathBuf> {
    folder(|variable| std::env::var_os(variable)).map(|folder| folder.join(name))
}

/// Of the XDG base directory specification: a variable that is not absolute counts as not set.
fn folder(variable: impl Fn(&str) -> Option<OsString>) -> Option<PathBuf> {
    let absolute = |name| variable(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")))?;
    Some(cache.join("lockstep"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: Source = Source { name: "some", text: "text" };
    const NVRTC: Version = Version { major: 13, minor: 0, patch: 0 };

    #[test]
    fn a_source_is_compiled_once_and_again_where_its_file_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let (key, mut compiled) = (key(&SOURCE, Element::F32, "sm_90", NVRTC), 0);
        let mut get = || {
            let compile = || {
                compiled += 1;
                Ok(b"code".to_vec())
            };
            let cubin = cached(Some(folder.path()), &key, compile).unwrap();
            assert_eq!(cubin, b"code");
            compiled
        };
        assert_eq!([get(), get()], [1, 1]);
        let path = folder.path().join(format!("{key}.cubin"));
        let whole = fs::read(&path).unwrap();
        for damaged in [&b""[..], b"short", &whole[..whole.len() - 1], &[&whole[..], b"!"].concat()] {
            fs::write(&path, damaged).unwrap();
            let before = get();
            assert_eq!(get(), before, "kept again");
        }
        assert_eq!(get(), 5);
    }

    #[test]
    fn where_nothing_can_be_kept_kernels_are_compiled_all_the_same() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for folder in [None, Some(file.path())] {
            assert_eq!(cached(folder, "key", || Ok(b"code".to_vec())).unwrap(), b"code");
        }
    }

    #[test]
    fn the_key_depends_on_all_that_the_code_does() {
        let base = key(&SOURCE, Element::F32, "sm_90", NVRTC);
        assert_ne!(base, key(&Source { text: "texts", ..SOURCE }, Element::F32, "sm_90", NVRTC));
        assert_ne!(base, key(&SOURCE, Element::Bf16, "sm_90", NVRTC));
        assert_ne!(base, key(&SOURCE, Element::F32, "sm_80", NVRTC));
        assert_ne!(base, key(&SOURCE, Element::F32, "sm_90", Version { minor: 1, ..NVRTC }));
    }

    #[test]
    fn the_cache_is_where_the_xdg_specification_says() {
        let of = |cache: Option<&str>, home: Option<&str>| {
            folder(|name| if name == "HOME" { home } else { cache }.map(OsString::from))
        };
        assert_eq!(of(Some("/cache"), Some("/home/a")), Some("/cache/lockstep".into()));
        assert_eq!(of(Some("relative"), Some("/home/a")), Some("/home/a/.cache/lockstep".into()));
        assert_eq!(of(None, None), None);
    }
}
