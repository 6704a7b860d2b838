//! Which files of a folder are images, and of what class.
//!
//! ```text
//! DIR/train/CLASS/...   and  DIR/val/CLASS/...  or  DIR/test/CLASS/...
//! DIR/CLASS/...              the test set is drawn out of it
//! DIR/labels.csv, DIR/...    the same; the table has a line FILE,CLASS for every file
//! DIR/CLASS_...              the same; the class is what stands before the first `_` of a file's name
//! ```
//!
//! Classes are numbered in the order of their names, files stand in the order of classes and names: nothing depends on the
//! order in which the file system lists them.

use crate::config::raw::ImageFolder;
use crate::data::encoded::EncodedImages;
use crate::data::files;
use crate::error::{Context, Error, Kind, Result};
use rustix::fs::OFlags;
use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

const LABELS: &str = "labels.csv";
/// Folders below a class folder, at most.
const DEPTH: usize = 16;

/// Training and test images, or all together.
pub enum Found {
    Parts { train: FolderImages, test: FolderImages },
    Whole(FolderImages),
}

/// Files with their classes.
pub struct FolderImages {
    root: PathBuf,
    classes: Vec<String>,
    files: Vec<Labelled>,
    /// Bytes of a file that are read at most: one more than are allowed, so that it shows.
    most: u64,
}

#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Labelled {
    label: u32,
    /// Below the root.
    path: PathBuf,
}

/// How a folder says which images are of which class.
enum Form {
    Parts { train: String, test: Option<String> },
    Table(PathBuf),
    Classes,
    Prefixes,
}

impl Form {
    /// The one that the configuration asks for, else the first that fits.
    fn of(folder: &ImageFolder, listing: &[String]) -> Result<Form> {
        let root = &folder.path;
        if let Some(labels) = &folder.labels {
            return match folder.train_folder.is_some() || folder.test_folder.is_some() {
                true => Err(Error::usage("give data.labels, or data.train_folder and data.test_folder: not both")),
                false => Ok(Form::Table(root.join(labels))),
            };
        }
        let given_or_found = |given: &Option<String>, usual: &[&str]| {
            let found = || usual.iter().find(|name| root.join(name).is_dir()).map(|name| name.to_string());
            given.clone().or_else(found)
        };
        if let Some(train) = given_or_found(&folder.train_folder, &["train"]) {
            return Ok(Form::Parts { train, test: given_or_found(&folder.test_folder, &["val", "test"]) });
        }
        if folder.test_folder.is_some() {
            return Err(Error::usage(format!(
                "data.test_folder is given and {} has no folder `train`; give data.train_folder too",
                root.display()
            )));
        }
        if listing.iter().any(|name| name == LABELS) {
            return Ok(Form::Table(root.join(LABELS)));
        }
        let images = listing.iter().filter(|name| is_image(Path::new(name))).count();
        if images == 0 {
            return Ok(Form::Classes);
        }
        for name in listing.iter().filter(|name| !hidden(name) && root.join(name).is_dir()) {
            let mut within = Vec::new();
            collect(root, Path::new(name), DEPTH, &mut within)?;
            if !within.is_empty() {
                let root = root.display();
                tracing::warn!("{root}: its folders are the classes; {images} images beside them are left aside");
                return Ok(Form::Classes);
            }
        }
        Ok(Form::Prefixes)
    }
}

/// Lists the files of `[data] path`. None of them is opened, so a file may still turn out to be no image.
pub fn find(folder: &ImageFolder, max_bytes: u64) -> Result<Found> {
    let root = &folder.path;
    let listing = files::list(root).map_err(|error| error.context("data.path is to be the folder of the images"))?;
    let new = |(classes, files)| FolderImages { root: root.clone(), classes, files, most: max_bytes.saturating_add(1) };
    let whole = match Form::of(folder, &listing)? {
        Form::Parts { train, test: Some(test) } => {
            let (classes, files) = class_folders(root, Path::new(&train))?;
            let tested = with_labels_of(&classes, class_folders(root, Path::new(&test))?, &root.join(test))?;
            return Ok(Found::Parts { train: new((classes.clone(), files)), test: new((classes, tested)) });
        }
        Form::Parts { train, test: None } => class_folders(root, Path::new(&train))?,
        Form::Table(table) => listed(&table)?,
        Form::Classes => class_folders(root, Path::new(""))?,
        Form::Prefixes => prefixed(root, &listing)?,
    };
    Ok(Found::Whole(new(whole)))
}

/// Names of the classes, and the files.
type Listing = (Vec<String>, Vec<Labelled>);

/// Every folder in `root/part` that holds images is a class.
fn class_folders(root: &Path, part: &Path) -> Result<Listing> {
    let folder = root.join(part);
    let names = files::list(&folder)?;
    let (mut classes, mut files, mut others) = (Vec::new(), Vec::new(), 0);
    for name in names.iter().filter(|name| !hidden(name)) {
        if name.contains(char::REPLACEMENT_CHARACTER) {
            return Err(Error::data(format!("{}: `{name}` is not named in UTF-8; rename it", folder.display())));
        }
        if !folder.join(name).is_dir() {
            continue;
        }
        let mut paths = Vec::new();
        others += collect(root, &part.join(name), DEPTH, &mut paths)?;
        if !paths.is_empty() {
            paths.sort();
            let label = classes.len() as u32;
            files.extend(paths.into_iter().map(|path| Labelled { label, path }));
            classes.push(name.clone());
        }
    }
    if others > 0 {
        tracing::info!("{}: {others} files that are not named .jpg, .jpeg or .png are left aside", folder.display());
    }
    if files.is_empty() {
        return Err(Error::data(format!(
            "{} has no folder with .jpg, .jpeg or .png files in it, it holds {}; expected a folder a class, or train/ and \
             val/ with a folder a class each, or files with a table {LABELS}",
            folder.display(),
            files::summary(&names)
        )));
    }
    Ok((classes, files))
}

/// Adds the images in `root/below` and its folders; returns how many other files there are.
fn collect(root: &Path, below: &Path, depth: usize, paths: &mut Vec<PathBuf>) -> Result<usize> {
    let folder = root.join(below);
    let doing = || format!("opening the folder {}", folder.display());
    let mut others = 0;
    for entry in fs::read_dir(&folder).or_kind(Kind::Data, doing())? {
        let entry = entry.or_kind(Kind::Data, doing())?;
        let path = below.join(entry.file_name());
        let mut kind = entry.file_type().or_kind(Kind::Data, doing())?;
        if kind.is_symlink() {
            let target = || format!("following the link {}", root.join(&path).display());
            kind = fs::metadata(root.join(&path)).or_kind(Kind::Data, target())?.file_type();
        }
        if kind.is_dir() {
            if depth == 0 {
                return Err(Error::data(format!("{} is nested too deep, or in itself by a link", folder.display())));
            }
            others += collect(root, &path, depth - 1, paths)?;
        } else if kind.is_file() && is_image(&path) {
            paths.push(path);
        } else {
            others += 1;
        }
    }
    Ok(others)
}

fn hidden(name: &str) -> bool {
    name.starts_with('.')
}

fn is_image(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    !hidden(&name) && ["jpg", "jpeg", "png"].iter().any(|known| extension.eq_ignore_ascii_case(known))
}

/// The test files with the numbers that their classes have in training.
fn with_labels_of(classes: &[String], (own, mut files): Listing, folder: &Path) -> Result<Vec<Labelled>> {
    let labels: Vec<u32> = own
        .iter()
        .map(|name| match classes.binary_search(name) {
            Ok(label) => Ok(label as u32),
            Err(_) => Err(Error::data(format!(
                "{} has the class `{name}`, of which there is no training image; the training classes are {}",
                folder.display(),
                files::summary(classes)
            ))),
        })
        .collect::<Result<_>>()?;
    files.iter_mut().for_each(|file| file.label = labels[file.label as usize]);
    Ok(files)
}

/// A table with the columns `file` and `class`, and any others; files are named as seen from the folder.
fn listed(table: &Path) -> Result<Listing> {
    let doing = || format!("reading {}", table.display());
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::All).from_path(table).or_kind(Kind::Data, doing())?;
    let headers = reader.headers().or_kind(Kind::Data, doing())?;
    let column = |name: &str| {
        headers.iter().position(|header| header.eq_ignore_ascii_case(name)).ok_or_else(|| {
            let found: Vec<&str> = headers.iter().collect();
            Error::data(format!(
                "{}: there is no column `{name}`; expected a first line `file,class`, found `{}`",
                table.display(),
                found.join(",")
            ))
        })
    };
    let (file, class) = (column("file")?, column("class")?);
    let mut lines = Vec::new();
    for record in reader.records() {
        let record = record.or_kind(Kind::Data, doing())?;
        if record[file].is_empty() || record[class].is_empty() {
            let line = record.position().map_or(0, |position| position.line());
            return Err(Error::data(format!("{}, line {line}: it names no file or no class", table.display())));
        }
        lines.push((record[class].to_owned(), PathBuf::from(&record[file])));
    }
    match lines.is_empty() {
        true => Err(Error::data(format!("{}: there is no line below `file,class`", table.display()))),
        false => Ok(numbered(lines)),
    }
}

/// `n01440764_tench.JPEG` is of the class `n01440764`.
fn prefixed(root: &Path, listing: &[String]) -> Result<Listing> {
    let class = |name: &String| match name.split_once('_') {
        Some((class, _)) => Ok((class.to_owned(), PathBuf::from(name))),
        None => Err(Error::data(format!(
            "the class of {} is not known: put the images into a folder a class, or list them in {} with the columns \
             file,class, or name them CLASS_...",
            root.join(name).display(),
            root.join(LABELS).display()
        ))),
    };
    Ok(numbered(listing.iter().filter(|name| is_image(Path::new(name))).map(class).collect::<Result<_>>()?))
}

fn numbered(files: Vec<(String, PathBuf)>) -> Listing {
    let classes: BTreeSet<&String> = files.iter().map(|(class, _)| class).collect();
    let classes: Vec<String> = classes.into_iter().cloned().collect();
    let label = |class: &String| classes.binary_search(class).expect("it is among them") as u32;
    let mut files: Vec<Labelled> =
        files.into_iter().map(|(class, path)| Labelled { label: label(&class), path }).collect();
    files.sort();
    (classes, files)
}

impl FolderImages {
    fn path(&self, index: usize) -> PathBuf {
        self.root.join(&self.files[index].path)
    }
}

impl EncodedImages for FolderImages {
    fn len(&self) -> usize {
        self.files.len()
    }
    fn classes(&self) -> &[String] {
        &self.classes
    }
    fn label(&self, index: usize) -> u32 {
        self.files[index].label
    }
    fn read(&self, index: usize, bytes: &mut Vec<u8>) -> Result<()> {
        bytes.clear();
        let path = self.path(index);
        let doing = || format!("reading {}", path.display());
        // Opening a pipe would wait for who writes into it; a file does not know this flag.
        let no_wait = OFlags::NONBLOCK.bits() as i32;
        let file = OpenOptions::new().read(true).custom_flags(no_wait).open(&path).or_kind(Kind::Data, doing())?;
        if !file.metadata().or_kind(Kind::Data, doing())?.is_file() {
            return Err(Error::data(format!("{} is no file", path.display())));
        }
        file.take(self.most).read_to_end(bytes).map(|_| ()).or_kind(Kind::Data, doing())
    }
    fn name(&self, index: usize) -> String {
        self.path(index).display().to_string()
    }
}

#[cfg(test)]
mod tests;
