//! What is said where a library is missing, is not one, is too old, or does not work.

use crate::harness::{in_a_process, library, stub, under_the_stub};
use crate::program::program;
use lockstep::device::cuda::libraries::{self, Library};
use lockstep::device::cuda::probe;
use lockstep::error::{Kind, Result};
use std::fs;
use std::path::Path;

#[test]
fn a_missing_library_is_named_with_where_it_was_looked_for_and_what_brings_it() {
    let nothing = tempfile::tempdir().unwrap();
    let empty = [("PATH", nothing.path()), ("HOME", nothing.path()), ("LOCKSTEP_CUDA_PATH", nothing.path())];
    in_a_process(&empty, || {
        says(libraries::driver(), "the CUDA driver was not found: libcuda.so.1", "nvidia-driver");
        says(libraries::nvrtc(), "NVRTC was not found: libnvrtc.so.13 or libnvrtc.so.12", "nvidia-cuda-nvrtc");
        says(libraries::cublas_lt(), "cuBLASLt was not found: libcublasLt.so.13", "nvidia-cublas");
        says(libraries::cudnn(), "cuDNN was not found: libcudnn.so.9", "nvidia-cudnn-cu13");
        says(libraries::nccl(), "NCCL was not found: libnccl.so.2", "nvidia-nccl-cu13");
    });
}

fn says(found: Result<&Library>, missing: &str, package: &str) {
    match found {
        Ok(library) => eprintln!("skipped: {} is there, in {}", library.name, library.path.display()),
        Err(error) => {
            let text = error.to_string();
            assert_eq!(error.kind(), Kind::Device);
            for part in [missing, package, "LD_LIBRARY_PATH", "CUDA_HOME", "the wheels nvidia-* of Python"] {
                assert!(text.contains(part), "no {part} in: {text}");
            }
        }
    }
}

#[test]
fn a_file_that_is_no_library_is_an_error_and_not_passed_over() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("libcuda.so.1"), "not a library").unwrap();
    in_a_process(&[("LOCKSTEP_CUDA_PATH", folder.path())], || {
        let folder = std::env::var("LOCKSTEP_CUDA_PATH").unwrap();
        let error = libraries::driver().unwrap_err().to_string();
        assert!(error.starts_with(&format!("the CUDA driver cannot be loaded: {folder}/libcuda.so.1: ")), "{error}");
    });
}

#[test]
fn a_library_without_all_functions_is_refused_before_one_is_called() {
    let source = tempfile::tempdir().unwrap();
    let file = source.path().join("old.rs");
    fs::write(&file, "#[unsafe(no_mangle)]\nextern \"C\" fn cuInit(_flags: u32) -> u32 { 0 }\n").unwrap();
    in_a_process(&[("LD_LIBRARY_PATH", &library("old", &["libcuda.so.1"], &file))], || {
        let error = libraries::driver().unwrap_err().to_string();
        let said = "/old/libcuda.so.1 is too old, or not what its name says: it lacks cuCtxSetCurrent and ";
        assert!(error.contains(said), "{error}");
    });
}

#[test]
fn what_the_driver_says_is_passed_on_with_what_to_do() {
    for (fault, said) in [
        ("no-device", "CUDA's cuInit failed with CUDA_ERROR_NO_DEVICE (100), said by the stub; see nvidia-smi -L"),
        (
            "mismatch",
            "CUDA's cuInit failed with CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803), said by the stub; libcuda and",
        ),
    ] {
        let mut info = program();
        info.arg("info")
            .env("LD_LIBRARY_PATH", stub())
            .env("STUB_CUDA_FAULT", fault)
            .env_remove("CUDA_VISIBLE_DEVICES");
        let output = info.assert().success().get_output().stdout.clone();
        let text = String::from_utf8(output).unwrap();
        assert!(text.contains(&format!("none: {said}")), "{text}");
    }
}

#[test]
fn info_lists_gpus_and_libraries_with_versions_and_paths() {
    let mut info = program();
    info.arg("info").env("LD_LIBRARY_PATH", stub());
    let text = String::from_utf8(info.assert().success().get_output().stdout.clone()).unwrap();
    let line = |name: &str| text.lines().find(|line| line.trim().starts_with(name)).unwrap_or_else(|| panic!("{text}"));
    assert!(line("GPU").contains("0: Stub, 1024 MiB, sm_90, GPU-00010203-0405-0607-0809-0a0b0c0d0e0f"), "{text}");
    assert!(line("CUDA").contains("for CUDA up to 13.0, ") && line("CUDA").contains("/libcuda.so"), "{text}");
    assert!(line("NVRTC").contains("13.0, ") && line("NVRTC").contains("/libnvrtc.so"), "{text}");
}

#[test]
fn the_folder_that_the_user_names_is_searched_first_and_must_win() {
    in_a_process(&[("LOCKSTEP_CUDA_PATH", &stub())], || match libraries::driver() {
        Ok(driver) => assert!(driver.path.starts_with(std::env::var("LOCKSTEP_CUDA_PATH").unwrap()), "{driver:?}"),
        // A driver's libcuda.so, without a version, is what cudarc asks for first.
        Err(error) => assert!(error.to_string().contains("before it; put the folder into LD_LIBRARY_PATH"), "{error}"),
    });
}

#[test]
fn code_that_is_newer_than_the_driver_is_refused_before_it_is_loaded() {
    under_the_stub("old-driver", || {
        let gpu = lockstep::device::cuda::Gpu::take(0).unwrap();
        let source = &lockstep::device::cuda::kernels::Source { name: "none", text: "" };
        let error = gpu.module(source, lockstep::device::cuda::kernels::Element::F32).err().unwrap().to_string();
        assert!(error.starts_with("NVRTC 13.0 (") && error.contains("driver for CUDA 12.8 does not take"), "{error}");
        assert_eq!(probe::gpus().unwrap().driver.version.major, 12);
    });
}

#[test]
fn what_cuda_lacks_is_said_before_anything_is_begun_and_auto_is_the_cpu_then() {
    let out = tempfile::tempdir().unwrap();
    let run = |device: &str| {
        let mut train = program();
        train.args(["-v", "--config", "configs/quickstart.toml", "--set", "run.epochs=1", "--set", "run.steps=1"]);
        train.args(["--set", "data.train=256", "--set", "data.test=16", "--set", device, "--out"]);
        let output = train.arg(out.path().join("run")).env("LD_LIBRARY_PATH", stub()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, said) = run("run.device=cuda");
    assert_eq!(code, Some(6), "{said}");
    assert!(said.contains("cuDNN was not found: libcudnn.so.9") && said.contains("nvidia-cudnn-cu13"), "{said}");
    assert!(!Path::new(&out.path().join("run")).exists(), "nothing is begun");
    let (code, said) = run("run.device=auto");
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("computing on the CPU, though there is a GPU: cuDNN was not found: libcudnn.so.9"), "{said}");
}
