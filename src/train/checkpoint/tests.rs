use super::*;
use proptest::prelude::*;
use std::process::{Command, Stdio};

fn state(step: u64) -> State {
    let tensor = |name: &str, shape: &[usize]| {
        let values = (0..shape.iter().product::<usize>()).map(|i| step as f32 + i as f32 / 7.0).collect();
        Tensor { name: name.to_string(), shape: shape.to_vec(), values }
    };
    State {
        run: "näht".to_string(),
        config: "[run]\nname = \"näht\"\n".to_string(),
        seed: u64::MAX,
        world_size: 2,
        step,
        epoch: step / 100,
        samples: step * 64,
        best_accuracy: Some(0.1 + 0.2),
        data: Some("fingerprint".to_string()),
        loss_scale: Some(LossScale { scale: 0.1, good_steps: 7, skipped: u32::MAX, skipped_in_a_row: 1 }),
        tensors: vec![
            tensor("bn.running_mean", &[5]),
            tensor("conv1.weight", &[4, 3, 3, 3]),
            tensor(&state_name("momentum_buffer", "conv1.weight"), &[4, 3, 3, 3]),
            tensor("scale", &[]),
        ],
    }
}

#[test]
fn one_without_the_data_s_fingerprint_is_accepted() {
    let folder = tempfile::tempdir().unwrap();
    let older = State { data: None, loss_scale: None, ..state(7) };
    let path = save(folder.path(), 1, &older).unwrap();
    assert_eq!(load(&path).unwrap(), older);
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn accept_all(_: &State) -> Result<()> {
    Ok(())
}

#[test]
fn a_state_comes_back_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let mut saved = state(123);
    saved.tensors[0].values[1] = f32::from_bits(0x0000_0001);
    saved.tensors[0].values[2] = f32::NEG_INFINITY;
    let path = save(folder.path(), 2, &saved).unwrap();
    assert_eq!(path.file_name().unwrap(), "step-00000123.safetensors");
    assert_eq!(load(&path).unwrap(), saved);

    saved.best_accuracy = None;
    saved.step = 124;
    save(folder.path(), 2, &saved).unwrap();
    let (path, found) = newest(folder.path(), accept_all).unwrap().unwrap();
    assert!(path.ends_with("step-00000124.safetensors"));
    assert_eq!(found, saved);
}

#[test]
fn only_the_newest_are_kept_and_an_abandoned_future_goes() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("notes.txt"), "mine").unwrap();
    for step in [10, 20, 30] {
        save(folder.path(), 2, &state(step)).unwrap();
    }
    assert_eq!(names(folder.path()), ["notes.txt", "step-00000020.safetensors", "step-00000030.safetensors"]);
    save(folder.path(), 2, &state(25)).unwrap();
    assert_eq!(names(folder.path()), ["notes.txt", "step-00000020.safetensors", "step-00000025.safetensors"]);
    save(folder.path(), 0, &state(25)).unwrap();
    assert_eq!(names(folder.path()), ["notes.txt", "step-00000025.safetensors"]);
}

#[test]
fn a_damaged_or_foreign_file_is_refused_with_the_reason_and_the_one_before_is_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = |step| folder.path().join(format!("step-{step:08}.safetensors"));
    for step in 1..=4 {
        save(folder.path(), 9, &state(step)).unwrap();
    }
    let whole = fs::read(path(4)).unwrap();
    fs::write(path(4), &whole[..whole.len() - 1]).unwrap();
    let mut flipped = fs::read(path(3)).unwrap();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(path(3), flipped).unwrap();
    let view = TensorView::new(Dtype::F32, vec![1], &[0; 4]).unwrap();
    fs::write(path(5), safetensors::serialize([("conv1.weight", view)], None).unwrap()).unwrap();
    fs::create_dir(path(6)).unwrap();

    let reason = |step| load(&path(step)).unwrap_err().to_string();
    assert!(reason(3).contains("damaged"), "{}", reason(3));
    assert!(reason(4).contains("truncated"), "{}", reason(4));
    assert!(reason(5).contains("not a checkpoint of Lockstep"), "{}", reason(5));
    assert!(reason(6).contains("not a file"), "{}", reason(6));
    assert!(reason(7).contains("cannot be opened"), "{}", reason(7));
    assert_eq!(newest(folder.path(), accept_all).unwrap().unwrap().1, state(2));

    let other_net = |state: &State| state.tensor("conv1.weight", &[8, 3, 3, 3]).map(drop);
    assert_eq!(newest(folder.path(), other_net).unwrap(), None);
    let mismatch = other_net(&state(1)).unwrap_err().to_string();
    assert!(mismatch.contains("[4, 3, 3, 3]") && mismatch.contains("[8, 3, 3, 3]"), "{mismatch}");
    assert!(state(1).tensor("conv2.weight", &[]).unwrap_err().to_string().contains("no tensor conv2.weight"));
    assert_eq!(newest(Path::new("no/such/folder"), accept_all).unwrap(), None);
}

proptest! {
    /// Every flipped bit is found, wherever it is; every other damage ends in an error or in the very same state.
    #[test]
    fn damage_is_found(bit in any::<prop::sample::Index>(), cut in any::<prop::sample::Index>(), junk: [u8; 8]) {
        let folder = tempfile::tempdir().unwrap();
        let whole = fs::read(save(folder.path(), 1, &state(7)).unwrap()).unwrap();

        let mut flipped = whole.clone();
        let at = bit.index(whole.len() * 8);
        flipped[at / 8] ^= 1 << (at % 8);
        prop_assert!(decode(&flipped).is_err(), "bit {at}");

        let cut = cut.index(whole.len());
        prop_assert!(decode(&whole[..cut]).is_err());
        prop_assert!(decode(&[&whole[..], &junk[..]].concat()).is_err());

        let mut replaced = whole.clone();
        let from = cut.min(whole.len() - junk.len());
        replaced[from..from + junk.len()].copy_from_slice(&junk);
        prop_assert!(replaced == whole || decode(&replaced).is_err());
    }

    /// Headers that promise what the file does not hold.
    #[test]
    fn a_lying_header_is_refused(dims in prop::collection::vec(any::<u64>(), 0..5), end: u64, length: u64) {
        let header = format!(r#"{{"a":{{"dtype":"F32","shape":{dims:?},"data_offsets":[0,{end}]}}}}"#);
        let length_of = |length: u64| [&length.to_le_bytes(), header.as_bytes(), &[0; 64]].concat();
        prop_assert!(decode(&length_of(header.len() as u64)).is_err());
        prop_assert!(decode(&length_of(length)).is_err());
    }
}

#[test]
fn the_digest_depends_on_names_shapes_and_values_but_not_on_the_order() {
    let tensors = state(1).tensors;
    let digest = weights_digest(&tensors);
    assert_eq!(digest.len(), 64);
    assert_eq!(digest, weights_digest(&tensors.iter().rev().cloned().collect::<Vec<_>>()));
    let changes: [fn(&mut Tensor); 3] = [
        |tensor| tensor.name = "conv2.weight".to_string(),
        |tensor| tensor.shape = vec![3, 4, 3, 3],
        |tensor| tensor.values[107] = -tensor.values[107],
    ];
    for change in changes {
        let mut other = tensors.clone();
        change(&mut other[1]);
        assert_ne!(digest, weights_digest(&other));
    }
    // The definition, written out: one tensor "b" of shape [2] with the values 1 and -2.
    let mut bytes = vec![1, 0, 0, 0, 0, 0, 0, 0, b'b', 1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0];
    bytes.extend([8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]);
    let one = Tensor { name: "b".to_string(), shape: vec![2], values: vec![1.0, -2.0] };
    assert_eq!(weights_digest(&[one]), blake3::hash(&bytes).to_hex().to_string());
}

const SAVE_INTO: &str = "LOCKSTEP_TEST_SAVE_INTO";

/// The process that the next test kills: saves ever newer states until then. Does nothing on its own.
#[test]
fn save_until_killed() {
    let Some(folder) = std::env::var_os(SAVE_INTO) else { return };
    for step in 1.. {
        let mut state = state(step);
        state.tensors[1] =
            Tensor { name: "large".to_string(), shape: vec![500_000], values: vec![step as f32; 500_000] };
        save(Path::new(&folder), 2, &state).unwrap();
    }
}

#[test]
fn kill_9_in_the_middle_of_saving_leaves_a_checkpoint_to_go_on_from() {
    let folder = tempfile::tempdir().unwrap();
    for round in 1..=5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "train::checkpoint::tests::save_until_killed"])
            .env(SAVE_INTO, folder.path())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // Each child starts again at step 1, so a newest step of `round` or more is its own.
        while list(folder.path()).unwrap().first().is_none_or(|(step, _)| *step < 2 + round) {
            assert!(child.try_wait().unwrap().is_none(), "the saving process ended by itself");
            std::thread::yield_now();
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let (path, found) = newest(folder.path(), accept_all).unwrap().unwrap();
        assert_eq!(path, list(folder.path()).unwrap()[0].1, "the newest file was not whole");
        let large = found.tensor("large", &[500_000]).unwrap();
        assert!(large.values.iter().all(|&value| value == found.step as f32));

        save(folder.path(), 1, &state(1)).unwrap();
        assert_eq!(names(folder.path()), ["step-00000001.safetensors"], "leftovers remain");
    }
}
