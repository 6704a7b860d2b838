//! The real NVRTC, which needs no GPU: every `.cu` file of the source tree compiles for the architectures of A100, H100 and B200
//! and for every type of value.

use lockstep::device::cuda::kernels::{Element, Source, compile};
use lockstep::device::cuda::libraries;
use std::fs;
use std::path::Path;

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90", "sm_100"];

#[test]
fn every_kernel_compiles_for_every_architecture_and_type() {
    if let Err(error) = libraries::nvrtc() {
        return eprintln!("skipped: {error}");
    }
    let mut files = Vec::new();
    find(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut files);
    assert!(files.len() >= 3, "{files:?}");
    for name in files {
        let text: &'static str = fs::read_to_string(&name).unwrap().leak();
        let source = Source { name: name.leak(), text };
        for element in Element::ALL {
            for architecture in ARCHITECTURES {
                let cubin =
                    compile(&source, element, architecture).unwrap_or_else(|error| panic!("{element:?}: {error}"));
                assert!(cubin.starts_with(b"\x7fELF"), "{}: {element:?} for {architecture}", source.name);
            }
        }
    }
}

#[test]
fn an_error_in_a_source_and_a_gpu_that_is_not_known_are_said() {
    if let Err(error) = libraries::nvrtc() {
        return eprintln!("skipped: {error}");
    }
    let broken = Source { name: "broken", text: "extern \"C\" __global__ void broken(T* x) { x[0] = ; }" };
    let error = compile(&broken, Element::F32, "sm_90").unwrap_err().to_string();
    assert!(error.contains("broken.cu for sm_90: broken.cu(1): error:"), "{error}");
    let fine = Source { name: "fine", text: "extern \"C\" __global__ void fine() {}" };
    let error = compile(&fine, Element::F32, "sm_9").unwrap_err().to_string();
    assert!(error.contains("fine.cu for sm_9") && error.contains("install a newer one"), "{error}");
}

/// All `.cu` files below a folder.
fn find(folder: &Path, files: &mut Vec<String>) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            find(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "cu") {
            files.push(path.to_str().unwrap().to_owned());
        }
    }
}
