//! One pass over the slices of a tensor: each element is read once, updated in registers, and written once. A step of S
//! state tensors moves 4 (2 + S) bytes in and 4 (1 + S) bytes out an element, and memory is what bounds it.
//!
//! No reduction crosses elements here and no multiply-add is contracted, so the bits depend neither on the cut, nor on
//! the threads, nor on the width of the machine's vectors. Inside a team (a rayon pool) all of its threads take part.

/// Elements that one task handles: 64 KiB a slice, well above the cost of handing a task to another thread.
const BLOCK: usize = 1 << 14;

/// Cuts fall on multiples of this many elements: a cache line.
const LINE: usize = 16;

/// Updates a tensor by `rule(param, grad, state) -> (param, state)`. All slices have one length.
pub(super) fn update<const S: usize>(
    params: &mut [f32],
    grads: &[f32],
    state: &mut [&mut [f32]],
    rule: impl Fn(f32, f32, [f32; S]) -> (f32, [f32; S]) + Sync,
) {
    let state: &mut [&mut [f32]; S] = state.try_into().expect("as many state tensors as state() names");
    assert!(grads.len() == params.len() && state.iter().all(|s| s.len() == params.len()), "slices of one length");
    in_halves(params, grads, state.each_mut().map(|s| &mut **s), &rule);
}

fn in_halves<const S: usize>(
    params: &mut [f32],
    grads: &[f32],
    mut state: [&mut [f32]; S],
    rule: &(impl Fn(f32, f32, [f32; S]) -> (f32, [f32; S]) + Sync),
) {
    if params.len() <= BLOCK || rayon::current_thread_index().is_none() {
        return block(params, grads, state, rule);
    }
    let middle = (params.len() / 2).next_multiple_of(LINE);
    let (left_params, right_params) = params.split_at_mut(middle);
    let (left_grads, right_grads) = grads.split_at(middle);
    let mut right_state: [&mut [f32]; S] = std::array::from_fn(|_| Default::default());
    let left_state = std::array::from_fn(|i| {
        let (left, right) = std::mem::take(&mut state[i]).split_at_mut(middle);
        right_state[i] = right;
        left
    });
    rayon::join(
        || in_halves(left_params, left_grads, left_state, rule),
        || in_halves(right_params, right_grads, right_state, rule),
    );
}

fn block<const S: usize>(
    params: &mut [f32],
    grads: &[f32],
    state: [&mut [f32]; S],
    rule: &impl Fn(f32, f32, [f32; S]) -> (f32, [f32; S]),
) {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the feature was just detected.
        return unsafe { block_avx2(params, grads, state, rule) };
    }
    each(params, grads, state, rule);
}

/// `each`, compiled for eight lanes; the build itself targets every x86-64.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn block_avx2<const S: usize>(
    params: &mut [f32],
    grads: &[f32],
    state: [&mut [f32]; S],
    rule: &impl Fn(f32, f32, [f32; S]) -> (f32, [f32; S]),
) {
    each(params, grads, state, rule);
}

#[inline(always)]
fn each<const S: usize>(
    params: &mut [f32],
    grads: &[f32],
    state: [&mut [f32]; S],
    rule: &impl Fn(f32, f32, [f32; S]) -> (f32, [f32; S]),
) {
    let grads = &grads[..params.len()];
    let state = state.map(|s| &mut s[..params.len()]);
    for i in 0..params.len() {
        let (param, next) = rule(params[i], grads[i], std::array::from_fn(|s| state[s][i]));
        params[i] = param;
        for s in 0..S {
            state[s][i] = next[s];
        }
    }
}
