//! The functions of `common.cuh`, compiled for the host, against the CPU's: Philox, conversions, and how `map` deals out values.

use half::{bf16, f16};
use lockstep::rng::philox;
use std::fmt::Write;
use std::process::Command;

#[test]
fn shared_functions_are_those_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("header");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cuda/header.cpp");
    let Ok(status) = Command::new("c++").args(["-std=c++17", "-O1", "-o"]).arg(&program).arg(source).status() else {
        return eprintln!("skipped: no C++ compiler: install one that can be called as c++");
    };
    assert!(status.success(), "{source} does not compile");
    let (mut asked, mut expected) = (String::new(), Vec::new());
    // The second and the third are half-way between two bf16.
    let values = [-0.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -3.7e-6, 65504.0, 65520.0, 3.3e38, f32::INFINITY, 1e-40];
    for (index, value) in values.map(f32::to_bits).into_iter().chain((1..200).map(|i| i * 0x0101_3579)).enumerate() {
        let (counter, key) = ([value, index as u32, 7, !value], [value ^ 0x55AA, index as u32 * 3]);
        writeln!(asked, "{value} {} 7 {} {} {}", counter[1], counter[3], key[0], key[1]).unwrap();
        let words = philox(counter, key);
        let x = f32::from_bits(value);
        expected.push((words, bf16::from_f32(x), f16::from_f32(x)));
    }
    let said = assert_cmd::Command::new(&program).write_stdin(asked).assert().success().get_output().stdout.clone();
    let said = String::from_utf8(said).unwrap();
    let mut lines = said.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    for (words, brief, half) in expected {
        let line = lines.next().unwrap();
        assert_eq!(line[..4], words.map(|word| word.to_string()));
        assert!((line[4].parse::<f32>().unwrap() - (words[0] >> 8) as f32 / 16_777_216.0).abs() < 1e-6);
        let line = lines.next().unwrap();
        let wide: Vec<f32> = line[2..].iter().map(|value| value.parse().unwrap()).collect();
        if brief.is_nan() {
            assert!(wide.iter().all(|value| value.is_nan()), "{line:?}");
            continue;
        }
        assert_eq!(line[..2], [brief.to_bits().to_string(), half.to_bits().to_string()], "{brief} {half}");
        for (wide, exact) in wide.iter().zip([brief.to_f32(), half.to_f32()]) {
            // Printed with six digits.
            assert!(*wide == exact || (wide - exact).abs() <= 1e-5 * exact.abs(), "{wide} {exact}");
        }
    }
    for element in 0..3 {
        for (start, n) in [(0, 0), (0, 31), (0, 62), (1, 0), (1, 31), (1, 62)] {
            let line = lines.next().unwrap();
            let expected: Vec<String> = (start..start + n).map(|i| (2 * i + 1).to_string()).collect();
            assert_eq!(line[1..], expected, "element {element}, from {start}");
        }
    }
}
