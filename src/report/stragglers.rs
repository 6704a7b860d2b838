//! Who holds up the others. In lock step every rank takes as long as the slowest, and the others spend the difference
//! waiting: so the slowest is the one that waits least.

/// The ranks for which the others wait.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Stragglers {
    /// The one of them that waits least.
    pub rank: usize,
    /// How many they are.
    pub count: usize,
    /// By how much the others waited longer: what would be saved if these ranks were as fast as the next.
    pub seconds: f64,
}

impl Stragglers {
    /// From how long each rank has waited for others, in seconds. The ranks that waited less than half way between the
    /// least and the most are those waited for. `None` where they are no minority: then they are the rule, and the others
    /// are fast.
    pub fn find(waited: impl Iterator<Item = f64> + Clone) -> Option<Stragglers> {
        let ranks = || waited.clone().enumerate();
        let (rank, least) = ranks().min_by(|(_, a), (_, b)| a.total_cmp(b))?;
        let half_way = (least + waited.clone().fold(least, f64::max)) / 2.0;
        let slow = || waited.clone().filter(|waited| *waited < half_way);
        let seconds = waited.clone().filter(|waited| *waited >= half_way).fold(f64::INFINITY, f64::min)
            - slow().fold(least, f64::max);
        let count = slow().count();
        (count > 0 && 2 * count <= ranks().count()).then_some(Stragglers { rank, count, seconds })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn those_are_named_for_whom_the_others_wait() {
        let find = |waited: &[f64]| Stragglers::find(waited.iter().copied());
        let one = |rank, seconds| Some(Stragglers { rank, count: 1, seconds });
        assert_eq!(find(&[4.0, 0.5]), one(1, 3.5));
        assert_eq!(find(&[4.0, 3.0, 0.5, 5.0]), one(2, 2.5));
        let host = Stragglers { rank: 3, count: 2, seconds: 3.0 };
        assert_eq!(find(&[4.0, 4.5, 1.0, 0.5]), Some(host), "a host of two ranks, which do not wait for each other");
        assert_eq!(find(&[0.0, 0.1, 4.0]), None, "one fast rank");
        for same in [&[][..], &[2.0], &[2.0, 2.0, 2.0]] {
            assert_eq!(find(same), None);
        }
    }
}
