//! Which files of a folder belong to which part.

use crate::data::files::{list, summary};
use crate::error::{Context, Error, Kind, Result};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A part, the words that mark its files, and the key that names them instead.
struct Part {
    name: &'static str,
    words: &'static [&'static str],
    key: &'static str,
}

const TRAIN: Part = Part { name: "training", words: &["train"], key: "train_files" };
const TEST: Part = Part { name: "test", words: &["test", "validation", "val"], key: "test_files" };

/// The files of the training and of the test part, sorted: those that the patterns name, seen from the folder; without a
/// pattern, those with the part's word in their name.
pub fn find(folder: &Path, train: Option<&str>, test: Option<&str>) -> Result<[Vec<PathBuf>; 2]> {
    let listing = list(folder).map_err(|error| error.context("data.path is to be the folder of the TFRecord files"))?;
    let find = |part: &Part, pattern: Option<&str>| match pattern {
        Some(pattern) => matching(folder, part, pattern, &listing),
        None => named(folder, part, &listing),
    };
    Ok([find(&TRAIN, train)?, find(&TEST, test)?])
}

fn matching(folder: &Path, part: &Part, pattern: &str, listing: &[String]) -> Result<Vec<PathBuf>> {
    let doing = format!("data.{} = \"{pattern}\"", part.key);
    let whole = format!("{}/{pattern}", glob::Pattern::escape(&folder.to_string_lossy()));
    let found = glob::glob(&whole).or_kind(Kind::Usage, &doing)?;
    let mut paths: Vec<PathBuf> = found.collect::<Result<_, _>>().or_kind(Kind::Data, &doing)?;
    paths.retain(|path| path.is_file() && path.extension().is_none_or(|extension| extension != "index"));
    paths.sort();
    match paths.is_empty() {
        false => Ok(paths),
        true => Err(Error::data(format!("{doing} matches no file; {} holds {}", folder.display(), summary(listing)))),
    }
}

fn named(folder: &Path, part: &Part, listing: &[String]) -> Result<Vec<PathBuf>> {
    let mut by_word: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for name in listing.iter().filter(|name| is_shard(name)) {
        if let Some(word) = part.words.iter().find(|word| has_word(name, word)) {
            by_word.entry(word).or_default().push(name);
        }
    }
    let (folder_name, key, part) = (folder.display(), part.key, part.name);
    let words: Vec<&str> = by_word.keys().copied().collect();
    let [word] = words[..] else {
        return Err(Error::data(match words.is_empty() {
            true => format!(
                "{folder_name} has no files of the {part} part, such as `train-00000-of-00010` or `validation.tfrecord`; \
                 name them by data.{key} = \"PATTERN\". It holds {}",
                summary(listing)
            ),
            false => format!(
                "{folder_name} has files named `{}`, and all could be the {part} part; say which by data.{key} = \
                 \"{}-*\"",
                words.join("` and `"),
                words[0]
            ),
        }));
    };
    let names = &by_word[word];
    check_complete(names).map_err(|what| {
        let advice = format!("fetch them, or name those to use by data.{key} = \"PATTERN\"");
        Error::data(format!("{folder_name}: of the {part} part {what}; {advice}"))
    })?;
    Ok(names.iter().map(|name| folder.join(name)).collect())
}

/// `train-00000-of-01024`, `mnist-train.tfrecord`, `train.tfrecords`: not the index beside it, nor a `train.txt`.
fn is_shard(name: &str) -> bool {
    !name.ends_with(".index") && (numbered(name).is_some() || name.contains(".tfrecord"))
}

fn has_word(name: &str, word: &str) -> bool {
    name.split(|c: char| !c.is_ascii_alphanumeric()).any(|part| part.eq_ignore_ascii_case(word))
}

/// The name before the number, the number, and how many there are: of `train-00003-of-01024`, `train`, 3 and 1024.
fn numbered(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, total) = name.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    Some((stem, number.parse().ok()?, total.parse().ok()?))
}

/// A set of which some files are missing trains, but not on what was meant.
fn check_complete(names: &[&str]) -> Result<(), String> {
    let mut there: BTreeMap<(&str, usize), Vec<usize>> = BTreeMap::new();
    for (stem, number, total) in names.iter().filter_map(|name| numbered(name)) {
        there.entry((stem, total)).or_default().push(number);
    }
    for ((stem, total), numbers) in there {
        if let Some(missing) = (0..total).find(|number| !numbers.contains(number)) {
            let count = total.saturating_sub(numbers.len());
            return Err(format!(
                "{count} of {total} files are missing, the first is {stem}-{missing:05}-of-{total:05}"
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(names: &[&str]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for name in names {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        folder
    }

    fn found(names: &[&str], train: Option<&str>, test: Option<&str>) -> Result<[Vec<String>; 2], String> {
        let folder = folder(names);
        let strip = |path: PathBuf| path.strip_prefix(folder.path()).unwrap().display().to_string();
        let parts = find(folder.path(), train, test).map_err(|error| error.to_string())?;
        Ok(parts.map(|paths| paths.into_iter().map(strip).collect()))
    }

    #[test]
    fn the_usual_names_are_found() {
        let imagenet = ["train-00001-of-00002", "train-00000-of-00002", "validation-00000-of-00001", "labels.txt"];
        let expected =
            [vec![imagenet[1], imagenet[0]], vec![imagenet[2]]].map(|part| part.into_iter().map(str::to_owned));
        assert_eq!(found(&imagenet, None, None).unwrap(), expected.map(|part| part.collect::<Vec<_>>()));

        let tfds = ["mnist-train.tfrecord-00000-of-00001", "mnist-test.tfrecord-00000-of-00001", "features.json"];
        assert_eq!(found(&tfds, None, None).unwrap(), [[tfds[0].to_owned()], [tfds[1].to_owned()]]);

        let plain = ["train.tfrecords", "train.tfrecords.index", "train.txt", "Val.tfrecords", "retrain.tfrecords"];
        assert_eq!(found(&plain, None, None).unwrap(), [[plain[0].to_owned()], [plain[3].to_owned()]]);
    }

    #[test]
    fn patterns_name_files_in_folders_too() {
        let names = ["train/a", "train/b", "train/a.index", "held/c", "validation-00000-of-00001"];
        let parts = found(&names, Some("train/*"), Some("held/?")).unwrap();
        assert_eq!(parts, [vec!["train/a".to_owned(), "train/b".to_owned()], vec!["held/c".to_owned()]]);
        let error = found(&names, Some("tain/*"), None).unwrap_err();
        assert!(error.contains("data.train_files = \"tain/*\" matches no file"), "{error}");
        assert!(error.contains("held, train"), "{error}");

        let root = folder(&["set[1]/train.a", "set[1]/val.b", "set1/train.a"]);
        let set = root.path().join("set[1]");
        let expected = [[set.join("train.a")], [set.join("val.b")]];
        assert_eq!(find(&set, Some("train*"), Some("val*")).unwrap(), expected, "the folder's name is no pattern");
    }

    #[test]
    fn what_is_missing_or_could_be_meant_twice_is_refused() {
        for (names, expected) in [
            (&["notes.txt"][..], "no files of the training part"),
            (&["train-00000-of-00001"], "no files of the test part"),
            (
                &["train-00000-of-00003", "train-00002-of-00003", "val.tfrecord"],
                "1 of 3 files are missing, the first is train-00001-of-00003",
            ),
            (
                &["train.tfrecord", "test.tfrecord", "validation.tfrecord"],
                "files named `test` and `validation`, and all could be the test part; say which by data.test_files",
            ),
        ] {
            let error = found(names, None, None).unwrap_err();
            assert!(error.contains(expected), "{expected}: {error}");
        }
        let three = ["train.tfrecord", "test.tfrecord", "validation.tfrecord"];
        assert_eq!(found(&three, None, Some("validation*")).unwrap()[1], ["validation.tfrecord"]);
    }
}
