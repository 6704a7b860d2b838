//! `scripts/fetch-data.sh` as a user meets it: what it refuses, and that it leaves nothing half done.

use assert_cmd::Command;
use std::fs;
use std::path::Path;

fn fetch(arguments: &[&str]) -> Command {
    let mut command = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/fetch-data.sh"));
    command.args(arguments);
    command
}

fn text(folder: &Path) -> &str {
    folder.to_str().expect("a temporary folder's name is text")
}

#[test]
fn a_wrong_checksum_is_refused_and_nothing_is_kept() {
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let file = "train-images-idx3-ubyte.gz";
    fs::write(from.path().join(file), "not the images").unwrap();
    for name in ["mnist", "fashion-mnist"] {
        let outcome = fetch(&[name, "--from", text(from.path()), "--to", text(to.path())]).assert().failure();
        let error = String::from_utf8(outcome.get_output().stderr.clone()).unwrap();
        assert!(error.contains(file) && error.contains("wrong checksum: expected SHA-256"), "{error}");
        assert_eq!(fs::read_dir(to.path()).unwrap().count(), 0, "{name} left something behind");
    }
}

#[test]
fn what_is_missing_or_unknown_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let from = text(folder.path());
    for (arguments, expected) in [
        (vec!["cifar-10", "--from", from, "--to", from], "cifar-10-binary.tar.gz: no such file"),
        (vec!["mnist", "--from", "no/such/folder"], "--from no/such/folder: no such folder"),
        (vec!["imagenet"], "there are mnist, fashion-mnist and cifar-10"),
        (vec!["mnist", "--form", from], "unknown option --form"),
        (vec!["mnist", "--from"], "--from needs a folder"),
        (vec![], "usage: scripts/fetch-data.sh NAME"),
    ] {
        let outcome = fetch(&arguments).current_dir(folder.path()).assert().failure();
        let error = String::from_utf8(outcome.get_output().stderr.clone()).unwrap();
        assert!(error.contains(expected), "{arguments:?}: {error}");
    }
}
