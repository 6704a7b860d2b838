//! The real NVRTC, which needs no GPU: every `.cu` file of the source tree compiles for the architectures of A100, H100 and B200
//! and for every type of value, and none needs local memory.

use lockstep::device::cuda::kernels::{Element, Source, compile, usage};
use lockstep::device::cuda::libraries;
use std::fs;
use std::path::Path;

const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90", "sm_100"];

#[test]
fn every_kernel_compiles_for_every_architecture_and_type() {
    if let Err(error) = libraries::nvrtc() {
        return eprintln!("skipped: {error}");
    }
    for source in sources() {
        for element in Element::ALL {
            for architecture in ARCHITECTURES {
                let cubin =
                    compile(&source, element, architecture).unwrap_or_else(|error| panic!("{element:?}: {error}"));
                assert!(cubin.starts_with(b"\x7fELF"), "{}: {element:?} for {architecture}", source.name);
            }
        }
    }
}

/// Registers that do not suffice, and arrays whose places are computed, lie in a thread's local memory: the GPU's, by way of its
/// caches. Prints what each kernel uses.
#[test]
fn no_kernel_needs_local_memory() {
    if let Err(error) = libraries::nvrtc() {
        return eprintln!("skipped: {error}");
    }
    let mut wrong = Vec::new();
    for source in sources() {
        for element in Element::ALL {
            let usage = usage(&source, element, "sm_90").unwrap();
            for kernel in usage.split("Compiling entry function ").skip(1) {
                let (name, used) = (kernel.split('\'').nth(1), kernel.split("; ").find(|part| part.contains("Used")));
                println!("{element:?} {:<26} {}", name.unwrap_or_default(), used.unwrap_or_default());
                if !kernel.contains(" 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") {
                    wrong.push(format!("{}, {element:?}: {kernel}", source.name));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{} kernels need local memory:\n{}", wrong.len(), wrong.join("\n"));
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

/// Every `.cu` file of the source tree.
fn sources() -> Vec<Source> {
    let mut files = Vec::new();
    find(Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/src")), &mut files);
    assert!(files.len() >= 3, "{files:?}");
    let source = |name: String| Source { text: fs::read_to_string(&name).unwrap().leak(), name: name.leak() };
    files.into_iter().map(source).collect()
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
