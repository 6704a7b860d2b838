//! Where CUDA's libraries may lie. A system package puts them where the dynamic linker looks; an archive and conda into a
//! folder that a variable names; PyTorch's wheels into Python's site-packages, `nvidia/cudnn/lib` and the like, where only
//! Python looks. Python is not started for that: its folders are found from where its program lies.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// Folders that come before all others: of the libraries, or above `lib` or `lib64`.
pub const VARIABLE: &str = "LOCKSTEP_CUDA_PATH";

/// Where NVIDIA's installer puts a toolkit.
const DEFAULT_ROOT: &str = "/usr/local/cuda";

/// What is looked through, in this order: the folders that the user names for this program, what the dynamic linker knows,
/// all others.
#[derive(Debug, PartialEq)]
pub struct Search {
    pub named: Vec<PathBuf>,
    pub others: Vec<PathBuf>,
    /// Python's installations, in whose site-packages some of `others` are.
    pythons: Vec<PathBuf>,
}

impl Search {
    /// `variable` reads the environment.
    pub fn new(variable: impl Fn(&str) -> Option<OsString>) -> Search {
        let paths = |name| variable(name).map(|value| env::split_paths(&value).collect::<Vec<_>>()).unwrap_or_default();
        let with_lib = |root: PathBuf| [root.join("lib64"), root.join("lib"), root];
        let roots = ["CUDA_HOME", "CUDA_PATH", "CONDA_PREFIX"].into_iter().flat_map(paths);
        let pythons = pythons(&paths("PATH"), [paths("VIRTUAL_ENV"), home_local(&paths("HOME"))].concat());
        let mut others: Vec<PathBuf> = roots.chain([PathBuf::from(DEFAULT_ROOT)]).flat_map(with_lib).collect();
        others.extend(pythons.iter().flat_map(|prefix| wheels(prefix)));
        Search { named: paths(VARIABLE).into_iter().flat_map(with_lib).collect(), others, pythons }
    }

    /// For an error: all that was looked through.
    pub fn places(&self) -> String {
        let list = |folders: &[PathBuf]| folders.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ");
        let named = match &self.named[..] {
            [] => format!("{VARIABLE} (not set)"),
            named => format!("{VARIABLE} ({})", list(named)),
        };
        format!(
            "{named}, the dynamic linker's folders (LD_LIBRARY_PATH, ld.so.cache), CUDA_HOME, CUDA_PATH, CONDA_PREFIX, \
             {DEFAULT_ROOT}, and the wheels nvidia-* of Python in {}",
            list(&self.pythons)
        )
    }
}

fn home_local(home: &[PathBuf]) -> Vec<PathBuf> {
    home.iter().map(|home| home.join(".local")).collect()
}

/// The prefixes of the Python installations that a user may mean: of the active environment, of `python3`, of the program
/// to which that is a link, the user's own, the system's.
fn pythons(path: &[PathBuf], mut prefixes: Vec<PathBuf>) -> Vec<PathBuf> {
    let prefix = |program: &Path| program.parent().and_then(Path::parent).map(Path::to_owned);
    if let Some(python) = path.iter().map(|folder| folder.join("python3")).find(|program| program.is_file()) {
        prefixes.extend(prefix(&python));
        prefixes.extend(python.canonicalize().ok().and_then(|program| prefix(&program)));
    }
    prefixes.extend(["/usr/local", "/usr"].map(PathBuf::from));
    let mut distinct = Vec::new();
    for prefix in prefixes {
        if !distinct.contains(&prefix) {
            distinct.push(prefix);
        }
    }
    distinct
}

/// The folders of libraries in the wheels `nvidia-*`.
fn wheels(prefix: &Path) -> Vec<PathBuf> {
    let Some(prefix) = prefix.to_str() else { return Vec::new() };
    let pattern = format!("{}/lib*/python3*/*-packages/nvidia/*/lib", glob::Pattern::escape(prefix));
    glob::glob(&pattern).map(|found| found.filter_map(Result::ok).collect()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_wheels_of_an_environment_and_of_the_python_behind_a_link_are_found() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for folder in [
            "venv/lib/python3.12/site-packages/nvidia/cudnn/lib",
            "real/lib/python3.12/dist-packages/nvidia/cu13/lib",
            "real/lib/python3.12/dist-packages/numpy/core/lib",
            "real/bin",
            "links/bin",
        ] {
            fs::create_dir_all(at(folder)).unwrap();
        }
        fs::write(at("real/bin/python3.12"), "").unwrap();
        symlink(at("real/bin/python3.12"), at("links/bin/python3")).unwrap();
        let variables = HashMap::from([
            (VARIABLE, at("mine").into_os_string()),
            ("VIRTUAL_ENV", at("venv").into_os_string()),
            ("PATH", env::join_paths([at("nothing"), at("links/bin")]).unwrap()),
            ("CUDA_HOME", "/opt/cuda".into()),
        ]);
        let search = Search::new(|name| variables.get(name).cloned());
        assert_eq!(search.named, [at("mine/lib64"), at("mine/lib"), at("mine")]);
        assert_eq!(search.others[0], Path::new("/opt/cuda/lib64"));
        let position = |path: &str| search.others.iter().position(|folder| *folder == at(path));
        let environment = position("venv/lib/python3.12/site-packages/nvidia/cudnn/lib").expect("of the environment");
        let linked = position("real/lib/python3.12/dist-packages/nvidia/cu13/lib").expect("behind the link");
        assert!(environment < linked, "the active environment comes first: {search:?}");
        assert!(!search.others.iter().any(|folder| folder.ends_with("core/lib")), "{search:?}");
    }

    #[test]
    fn without_any_variable_the_usual_places_are_left() {
        let search = Search::new(|_| None);
        assert!(search.named.is_empty());
        assert!(search.others.contains(&PathBuf::from("/usr/local/cuda/lib64")));
        let places = search.places();
        assert!(places.starts_with("LOCKSTEP_CUDA_PATH (not set), "), "{places}");
        assert!(places.ends_with("Python in /usr/local, /usr"), "{places}");
    }
}
