//! Every number that follows from the configuration, the ranks and the size of the data, derived here and nowhere else.

use super::raw::{BatchSize, Config};
use crate::error::{Error, Result};

/// The ranks of a run, as far as numbers depend on them.
#[derive(Clone, Copy, Debug)]
pub struct Ranks {
    /// The world size.
    pub size: usize,
    /// Compute threads of each.
    pub threads: usize,
}

/// Samples of each part, after the validation split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Samples {
    pub train: usize,
    pub validation: usize,
    pub test: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub ranks: usize,
    /// Samples a step over all ranks.
    pub global_batch: usize,
    /// Samples a step and rank.
    pub local_batch: usize,
    /// Samples of one forward and backward.
    pub micro_batch: usize,
    /// Forwards and backwards a step and rank.
    pub micros_per_rank: usize,
    /// Every sample once; the last step may be short.
    pub steps_per_epoch: u64,
    /// Where epochs or steps end the run; accuracy, minutes and signals may end it before.
    pub total_steps: Option<u64>,
    pub warmup_steps: u64,
    pub eval: Cadence,
    pub checkpoint: Cadence,
    /// When the ranks compare their parameters.
    pub audit: Cadence,
    pub log_every_steps: u64,
    /// A bucket of gradients is reduced when it holds at least so much.
    pub bucket_bytes: usize,
    /// The same where NCCL reduces it.
    pub nccl_bucket_bytes: usize,
    /// Threads of this rank.
    pub threads: usize,
}

/// When something is done beside training, in steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cadence {
    pub every_steps: Option<u64>,
    /// The steps of `every_epochs` epochs.
    pub every_epochs_steps: Option<u64>,
}

impl Cadence {
    /// Whether it is due after `done` steps of the run.
    pub fn due(&self, done: u64) -> bool {
        [self.every_steps, self.every_epochs_steps].into_iter().flatten().any(|period| done.is_multiple_of(period))
    }
}

impl Plan {
    /// Fails, naming the keys and values that would fit, where ranks, batches and data do not go together.
    pub fn new(config: &Config, ranks: Ranks, samples: Samples) -> Result<Plan> {
        let global_batch = global_batch(&config.batch, ranks.size)?;
        let local_batch = global_batch / ranks.size;
        let micro_batch = config.batch.micro.unwrap_or(local_batch);
        if samples.train == 0 {
            return Err(Error::data(
                "no training sample is left; give a smaller data.validation, or a data set that is not empty",
            ));
        }
        let steps_per_epoch = samples.train.div_ceil(global_batch) as u64;
        let of_epochs = |epochs: u64| epochs.saturating_mul(steps_per_epoch);
        let total_steps = [config.run.epochs.map(of_epochs), config.run.steps].into_iter().flatten().min();
        let bucket_bytes = |default: f64| (config.parallel.bucket_mib.unwrap_or(default) * f64::from(1 << 20)) as usize;
        let cadence = |every_steps, every_epochs: Option<u64>| Cadence {
            every_steps,
            every_epochs_steps: every_epochs.map(of_epochs),
        };
        Ok(Plan {
            ranks: ranks.size,
            global_batch,
            local_batch,
            micro_batch,
            micros_per_rank: local_batch / micro_batch,
            steps_per_epoch,
            total_steps,
            warmup_steps: warmup_steps(config, steps_per_epoch),
            eval: cadence(config.eval.every_steps, config.eval.every_epochs),
            checkpoint: cadence(config.checkpoint.every_steps, config.checkpoint.every_epochs),
            audit: cadence(Some(config.parallel.audit_every_steps).filter(|steps| *steps > 0), None),
            log_every_steps: config.log.every_steps,
            bucket_bytes: bucket_bytes(1.0),
            nccl_bucket_bytes: bucket_bytes(4.0),
            threads: ranks.threads,
        })
    }

    /// What to warn of, where the run ends before its warm-up does. That is no mistake: a few steps are how a
    /// configuration is tried out.
    pub fn cut_warmup(&self) -> Option<String> {
        let (warmup, total) = (self.warmup_steps, self.total_steps?);
        (warmup > total).then(|| {
            format!(
                "the warm-up takes {warmup} steps, but the run ends after {total}, below the full learning rate; for a \
                 run that should learn shorten schedule.warmup_epochs or schedule.warmup_steps"
            )
        })
    }
}

/// Samples a step. Without `micro`, every rank takes an equal part of it in one piece; with it, an equal number of
/// micro-batches. Fails, naming sizes that would fit, where that is not possible.
pub fn global_batch(batch: &BatchSize, ranks: usize) -> Result<usize> {
    let global = match (batch.global, batch.local) {
        (Some(global), _) => global,
        (None, local) => {
            let local = local.unwrap_or(1);
            if let Some(micro) = batch.micro.filter(|micro| !local.is_multiple_of(*micro)) {
                let fitting = multiples(local, micro);
                return refuse(format!("batch.local {local} is not a multiple of batch.micro {micro}; use {fitting}"));
            }
            local.checked_mul(ranks).ok_or_else(|| Error::usage(format!("batch.local {local} times {ranks} ranks")))?
        }
    };
    let Some(micro) = batch.micro else {
        return match global {
            _ if global.is_multiple_of(ranks) => Ok(global),
            _ if global < ranks => refuse(format!(
                "global batch {global} is smaller than {ranks} ranks; set batch.global to {ranks} or more"
            )),
            _ => refuse(format!(
                "global batch {global} is not divisible by {ranks} ranks; use {} (batch.global)",
                multiples(global, ranks)
            )),
        };
    };
    let micros = global / micro;
    if !global.is_multiple_of(micro) {
        let fitting = multiples(global, micro);
        refuse(format!("batch.global {global} is not a multiple of batch.micro {micro}; use {fitting}"))
    } else if micros < ranks {
        refuse(format!(
            "batch.global {global} makes {micros} micro-batches of batch.micro {micro}, fewer than {ranks} ranks; \
             set batch.global to {} or more, or batch.micro to {} or less",
            micro * ranks,
            (global / ranks).max(1)
        ))
    } else if !micros.is_multiple_of(ranks) {
        refuse(format!(
            "batch.global {global} makes {micros} micro-batches of batch.micro {micro}, which {ranks} ranks cannot \
             share equally; use {} (batch.global)",
            multiples(global, micro * ranks)
        ))
    } else {
        Ok(global)
    }
}

fn warmup_steps(config: &Config, steps_per_epoch: u64) -> u64 {
    let shared = &config.schedule.shared;
    let of_epochs = (shared.warmup_epochs * steps_per_epoch as f64).round() as u64;
    shared.warmup_steps.max(of_epochs)
}

fn refuse<T>(message: String) -> Result<T> {
    Err(Error::usage(message))
}

/// The multiples of `unit` on both sides of `value`.
fn multiples(value: usize, unit: usize) -> String {
    match value / unit * unit {
        0 => unit.to_string(),
        below => format!("{below} or {}", below + unit),
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{MINIMAL, parse};
    use super::*;
    use proptest::prelude::*;

    fn plan(sets: &[&str], size: usize, train: usize) -> Result<Plan> {
        let samples = Samples { train, validation: 0, test: 10 };
        Plan::new(&parse(MINIMAL, sets).unwrap(), Ranks { size, threads: 2 }, samples)
    }

    #[test]
    fn numbers_follow_from_config_ranks_and_data() {
        let sets =
            ["batch.global=96", "schedule.warmup_epochs=0.5", "checkpoint.every_steps=7", "parallel.bucket_mib=0.5"];
        assert_eq!(
            plan(&sets, 3, 1000).unwrap(),
            Plan {
                ranks: 3,
                global_batch: 96,
                local_batch: 32,
                micro_batch: 32,
                micros_per_rank: 1,
                steps_per_epoch: 11,
                total_steps: Some(22),
                warmup_steps: 6,
                eval: Cadence { every_steps: None, every_epochs_steps: Some(11) },
                checkpoint: Cadence { every_steps: Some(7), every_epochs_steps: None },
                audit: Cadence { every_steps: Some(100), every_epochs_steps: None },
                log_every_steps: 50,
                bucket_bytes: 1 << 19,
                nccl_bucket_bytes: 1 << 19,
                threads: 2,
            }
        );
        let local = plan(&["batch={ local = 24, micro = 8 }", "run.steps=5"], 4, 1000).unwrap();
        assert_eq!((local.global_batch, local.local_batch, local.micro_batch, local.micros_per_rank), (96, 24, 8, 3));
        assert_eq!(local.total_steps, Some(5));
        assert_eq!((local.bucket_bytes, local.nccl_bucket_bytes), (1 << 20, 4 << 20));
    }

    #[test]
    fn a_cadence_is_due_at_multiples_of_either_period() {
        let cadence = Cadence { every_steps: Some(4), every_epochs_steps: Some(6) };
        let due: Vec<u64> = (1..=12).filter(|&step| cadence.due(step)).collect();
        assert_eq!(due, [4, 6, 8, 12]);
    }

    #[test]
    fn what_does_not_fit_is_refused_with_what_would() {
        for (batch, size, train, words) in [
            ("{ global = 256 }", 3, 1000, "global batch 256 is not divisible by 3 ranks; use 255 or 258"),
            ("{ global = 2 }", 4, 1000, "global batch 2 is smaller than 4 ranks"),
            ("{ global = 100, micro = 32 }", 2, 1000, "not a multiple of batch.micro 32; use 96 or 128"),
            ("{ global = 8, micro = 32 }", 2, 1000, "not a multiple of batch.micro 32; use 32"),
            (
                "{ global = 64, micro = 32 }",
                4,
                1000,
                "fewer than 4 ranks; set batch.global to 128 or more, or batch.micro to 16",
            ),
            (
                "{ global = 160, micro = 32 }",
                2,
                1000,
                "5 micro-batches of batch.micro 32, which 2 ranks cannot share equally; use 128 or 192",
            ),
            ("{ local = 48, micro = 32 }", 2, 1000, "batch.local 48 is not a multiple of batch.micro 32; use 32 or 64"),
            ("{ global = 4 }", 2, 0, "no training sample is left"),
        ] {
            let error = plan(&[&format!("batch={batch}")], size, train).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn a_run_may_end_within_its_warm_up_with_a_warning() {
        let warning = |steps: u64| {
            plan(&["schedule.warmup_steps=9", &format!("run.steps={steps}")], 1, 1000).unwrap().cut_warmup()
        };
        assert!(warning(5).unwrap().contains("takes 9 steps, but the run ends after 5"));
        assert_eq!(warning(9), None);
    }

    proptest! {
        #[test]
        fn a_plan_deals_out_every_sample(
            global in 1usize..5000, micro in prop::option::of(1usize..64), size in 1usize..20, train in 1usize..100_000,
        ) {
            let micro = micro.map_or(String::new(), |micro| format!(", micro = {micro}"));
            if let Ok(plan) = plan(&[&format!("batch={{ global = {global}{micro} }}")], size, train) {
                prop_assert_eq!(plan.micro_batch * plan.micros_per_rank * size, global);
                prop_assert!(plan.steps_per_epoch as usize * global >= train);
                prop_assert!((plan.steps_per_epoch as usize - 1) * global < train);
            }
        }
    }
}
