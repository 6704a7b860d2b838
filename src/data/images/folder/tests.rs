use super::*;
use crate::data::files::tests::message;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use tempfile::TempDir;

fn folder(files: &[&str]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in files {
        let path = folder.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, file).unwrap();
    }
    folder
}

fn section(folder: &TempDir) -> ImageFolder {
    ImageFolder { path: folder.path().into(), labels: None, train_folder: None, test_folder: None, test: 0.1 }
}

/// Classes, and label and content of every file, which is its name.
fn told(images: &FolderImages) -> (Vec<&str>, Vec<(u32, String)>) {
    let file = |index| {
        let mut bytes = vec![1; 9];
        images.read(index, &mut bytes).unwrap();
        (images.label(index), String::from_utf8(bytes).unwrap())
    };
    (images.classes().iter().map(String::as_str).collect(), (0..images.len()).map(file).collect())
}

fn whole(section: &ImageFolder) -> FolderImages {
    match find(section, 1000).unwrap() {
        Found::Whole(images) => images,
        Found::Parts { .. } => panic!("this folder has one part"),
    }
}

fn labelled(files: &[(u32, &str)]) -> Vec<(u32, String)> {
    files.iter().map(|(label, name)| (*label, name.to_string())).collect()
}

#[test]
fn train_and_test_folders_share_the_numbers_of_the_classes() {
    for test in ["val", "test"] {
        let dog = format!("{test}/dog/1.JPEG");
        let folder = folder(&[
            "train/dog/b.jpg",
            "train/dog/a.PNG",
            "train/cat/deep/er/c.jpeg",
            "train/cat/notes.txt",
            "train/.x/h.jpg",
            "train/cat/._c.jpeg",
            "train/empty/readme",
            &dog,
        ]);
        let Found::Parts { train, test } = find(&section(&folder), 1000).unwrap() else { panic!("two parts") };
        let files = [(0, "train/cat/deep/er/c.jpeg"), (1, "train/dog/a.PNG"), (1, "train/dog/b.jpg")];
        assert_eq!(told(&train), (vec!["cat", "dog"], labelled(&files)));
        assert_eq!(told(&test), (vec!["cat", "dog"], labelled(&[(1, &dog)])));
        assert!(train.name(0).ends_with("train/cat/deep/er/c.jpeg"));
    }
}

#[test]
fn a_folder_without_a_test_part_is_one_set_in_each_of_its_forms() {
    let classes = folder(&["z/1.jpg", "a/2.jpg", "a/1.jpg"]);
    assert_eq!(
        told(&whole(&section(&classes))),
        (vec!["a", "z"], labelled(&[(0, "a/1.jpg"), (0, "a/2.jpg"), (1, "z/1.jpg")]))
    );

    let alone = folder(&["train/z/1.jpg"]);
    assert_eq!(told(&whole(&section(&alone))), (vec!["z"], labelled(&[(0, "train/z/1.jpg")])));

    let named = folder(&["n02_b_1.JPEG", "n01_a.JPEG", "README.md"]);
    assert_eq!(
        told(&whole(&section(&named))),
        (vec!["n01", "n02"], labelled(&[(0, "n01_a.JPEG"), (1, "n02_b_1.JPEG")]))
    );

    let table = folder(&["x.jpg", "sub/y.png"]);
    fs::write(table.path().join("labels.csv"), "class, size ,file\nred,1,x.jpg\nblue, 2, sub/y.png\n").unwrap();
    let expected = (vec!["blue", "red"], labelled(&[(0, "sub/y.png"), (1, "x.jpg")]));
    assert_eq!(told(&whole(&section(&table))), expected);
    fs::rename(table.path().join("labels.csv"), table.path().join("other.csv")).unwrap();
    assert_eq!(told(&whole(&ImageFolder { labels: Some("other.csv".into()), ..section(&table) })), expected);
}

/// A stray picture does not hide the class folders, a stray folder without pictures does not hide the files.
#[test]
fn what_lies_beside_the_images_is_left_aside() {
    let classes = folder(&["cover_page.png", "a/1.jpg", "b/2.jpg"]);
    assert_eq!(told(&whole(&section(&classes))), (vec!["a", "b"], labelled(&[(0, "a/1.jpg"), (1, "b/2.jpg")])));

    let named = folder(&["n01_a.JPEG", "docs/notes.txt"]);
    assert_eq!(told(&whole(&section(&named))), (vec!["n01"], labelled(&[(0, "n01_a.JPEG")])));
}

#[test]
fn links_are_followed_and_what_is_no_file_is_left_aside() {
    let elsewhere = folder(&["more/2.jpg"]);
    let images = folder(&["a/1.jpg"]);
    let class = images.path().join("a");
    symlink(elsewhere.path().join("more"), class.join("more")).unwrap();
    let pipe = class.join("pipe.jpg");
    mkfifo(&pipe);
    let found = whole(&section(&images));
    let contents = ["1.jpg", "more/2.jpg"].map(|name| class.join(name).metadata().unwrap().len());
    assert_eq!((found.len(), contents), (2, [7, 10]));
    assert_eq!(told(&found).1, labelled(&[(0, "a/1.jpg"), (0, "more/2.jpg")]));

    // Named in a table, it is an error, not a wait for who writes into it.
    fs::write(images.path().join("labels.csv"), "file,class\na/pipe.jpg,x\n").unwrap();
    let listed = whole(&section(&images));
    assert!(message(listed.read(0, &mut Vec::new())).contains("pipe.jpg is no file"));

    symlink(&class, class.join("itself")).unwrap();
    fs::remove_file(images.path().join("labels.csv")).unwrap();
    assert!(message(find(&section(&images), 1000)).contains("in itself by a link"));
}

fn mkfifo(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}

#[test]
fn a_table_that_is_asked_for_is_used() {
    let folder = folder(&["train/a/1.jpg", "val/a/2.jpg", "x.jpg"]);
    fs::write(folder.path().join("mine.csv"), "file,class\nx.jpg,red\n").unwrap();
    let asked = ImageFolder { labels: Some("mine.csv".into()), ..section(&folder) };
    assert_eq!(told(&whole(&asked)), (vec!["red"], labelled(&[(0, "x.jpg")])));
    let both = ImageFolder { train_folder: Some("train".into()), ..asked };
    assert!(find(&both, 1000).err().unwrap().to_string().contains("not both"));
}

#[test]
fn folders_can_be_named() {
    let folder = folder(&["train/a/1.jpg", "mine/b/2.jpg", "other/b/3.jpg"]);
    let named =
        ImageFolder { train_folder: Some("mine".into()), test_folder: Some("other".into()), ..section(&folder) };
    let Found::Parts { train, test } = find(&named, 1000).unwrap() else { panic!("two parts") };
    assert_eq!((told(&train).1, told(&test).1), (labelled(&[(0, "mine/b/2.jpg")]), labelled(&[(0, "other/b/3.jpg")])));
}

#[test]
fn what_does_not_fit_is_explained() {
    let refusal = |files: &[&str]| message(find(&section(&folder(files)), 1000));
    assert!(refusal(&["notes.txt"]).contains("it holds notes.txt; expected a folder a class"));
    assert!(refusal(&["a.jpg"]).contains("the class of "));
    let error = refusal(&["train/a/1.jpg", "val/b/1.jpg"]);
    assert!(
        error.contains("val has the class `b`, of which there is no training image; the training classes are a"),
        "{error}"
    );
    let odd = folder(&["a/1.jpg"]);
    let name = std::ffi::OsStr::from_bytes(b"caf\xe9");
    fs::create_dir(odd.path().join(name)).unwrap();
    assert!(message(find(&section(&odd), 1000)).contains("is not named in UTF-8"));
    let mut missing = section(&folder(&[]));
    missing.path = missing.path.join("not/there");
    assert!(message(find(&missing, 1000)).contains("data.path is to be the folder of the images: opening "));

    for (text, expected) in [
        ("name,class\nx,1\n", "there is no column `file`; expected a first line `file,class`, found `name,class`"),
        ("file,class\n", "there is no line below"),
        ("file,class\na.jpg\n", "reading "),
        ("file,class\na.jpg,x\na.jpg,\n", "line 3: it names no file or no class"),
    ] {
        let table = folder(&["a.jpg"]);
        fs::write(table.path().join("labels.csv"), text).unwrap();
        let error = message(find(&section(&table), 1000));
        assert!(error.contains(expected) && error.contains("labels.csv"), "{error}");
    }
}

#[test]
fn a_file_is_read_no_further_than_the_limit_shows() {
    let folder = folder(&["a/1.jpg"]);
    let Found::Whole(images) = find(&section(&folder), 3).unwrap() else { panic!("one part") };
    let mut bytes = Vec::new();
    images.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, b"a/1.", "one byte more than is allowed");
    fs::remove_file(folder.path().join("a/1.jpg")).unwrap();
    assert!(message(images.read(0, &mut bytes)).contains("a/1.jpg"));
}
