//! Weights in fp16 and the scale of their loss: the same bits everywhere, and steps that overflow change nothing.

use std::path::Path;

use overspill_io::{BackendChoice, Engine, EngineConfig, Pool};
use overspill_optim::{
    AdagradConfig, AdamWConfig, Isa, LossScalerConfig, MomentFormat, SgdConfig, WeightFormat,
};
use overspill_swap::{Durability, Store, Volume};
use overspill_train::Initializer;
use overspill_train::home::{Home, MemoryHome, Site, SwappedHome};
use overspill_train::identity::{Identity, Reached};
use overspill_train::optimizer::Optimizer;
use overspill_train::schedule::Schedule;
use overspill_train::trainer::{BatchSource, Commit, Settings, Trainer};

use crate::case::{Case, RUNNING, STEPS, Storage, Trained, drawn, equals_in_memory, is_resumed};

/// So large that the gradients of a fresh model overflow, and soon no more.
const OVERFLOWS: LossScalerConfig = LossScalerConfig {
    initial_scale: f32::MAX / 8.0,
    growth_factor: 2.0,
    backoff_factor: 0.5,
    growth_interval_steps: 2,
};

fn fp16(case: fn(u64) -> Case, moments: MomentFormat, scaler: LossScalerConfig) -> Case {
    let case = case(7).with(Optimizer::default(), WeightFormat::F16WithMaster, moments);
    Case { loss_scaler: Some(scaler), ..case }
}

#[test]
fn fp16_weights_train_to_the_same_bits_on_storage_and_in_memory() {
    let sgd = Optimizer::Sgd(SgdConfig { momentum: 0.9, ..SgdConfig::default() });
    let adagrad = Optimizer::Adagrad(AdagradConfig::default());
    for optimizer in [Optimizer::Adam(AdamWConfig::default()), sgd, adagrad] {
        let case = Case::untied(7);
        equals_in_memory(&case.with(optimizer, WeightFormat::F16WithMaster, MomentFormat::F32));
    }
    for moments in [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::Blocks8] {
        for case in [Case::tied as fn(u64) -> Case, Case::untied] {
            equals_in_memory(&fp16(case, moments, LossScalerConfig::default()));
        }
    }
}

#[test]
fn runs_that_skip_steps_are_resumed_to_the_same_bits() {
    for (case, part) in [(Case::tied as fn(u64) -> Case, 8.0), (Case::untied, 1.0)] {
        for moments in [MomentFormat::F32, MomentFormat::Blocks8] {
            let initial_scale = OVERFLOWS.initial_scale / part;
            let case = fp16(case, moments, LossScalerConfig { initial_scale, ..OVERFLOWS });
            let mut skipped = 0;
            let first = Initializer::new(&case.config, &case.layout, case.seed);
            let mut trainer = case.trainer(MemoryHome::new(&case.layout, &mut drawn(&first)).unwrap());
            for _ in 0..STEPS {
                skipped += u64::from(trainer.step(&RUNNING).unwrap().skipped);
            }
            assert!((1..STEPS).contains(&skipped), "{skipped} of {STEPS}");
            let scale = trainer.reached().unwrap().loss_scale.unwrap();
            assert_eq!(scale.steps_skipped, skipped);
            is_resumed(&case);
            let reference = case.in_memory();
            for depth in [0, 2] {
                let storage = Storage::new(&case, depth, BackendChoice::Auto);
                assert!(Trained::by(storage.trainer) == reference, "{moments:?}, depth {depth}");
                assert_eq!(storage.pool.leased_blocks(), 0);
            }
        }
    }
}

#[test]
fn a_scale_that_is_a_power_of_two_changes_no_bit() {
    for optimizer in [Optimizer::default(), Optimizer::Sgd(SgdConfig::default())] {
        let trained = |scale: Option<f32>| {
            let case = Case::untied(7).with(optimizer, WeightFormat::F16WithMaster, MomentFormat::F32);
            let scaler = |initial_scale| LossScalerConfig { initial_scale, ..LossScalerConfig::default() };
            Case { loss_scaler: scale.map(scaler), ..case }.in_memory()
        };
        let reference = trained(None);
        for scale in [1.0, 1024.0, 65536.0] {
            assert!(trained(Some(scale)) == reference, "{scale}");
        }
        assert!(trained(Some(3.0)) != reference, "any other rounds");
    }
}

/// The same batch in every step.
struct Same;

impl BatchSource for Same {
    fn fill(&self, _step: u64, micro: usize, inputs: &mut Vec<u32>, targets: &mut Vec<u32>) {
        inputs.extend((0..33).map(|token| (7 * token + micro as u32) % 256));
        targets.extend((0..33).map(|token| (7 * token + micro as u32 + 1) % 256));
    }
}

/// A learning rate that no step changes, so that only the number of updates matters.
fn settings(case: &Case, commit: Commit) -> Settings {
    Settings {
        shape: case.shape,
        schedule: Schedule { peak: 3e-3, warmup: 0, steps: u64::MAX },
        weight_decay: 0.1,
        clip: Some(0.8),
        optimizer: case.optimizer,
        loss_scaler: case.loss_scaler,
        seed: case.seed,
        isa: Isa::detect(),
        commit,
    }
}

/// All tensors that a store has committed: where they are, and their checksums.
fn committed(store: &Path) -> String {
    let manifest = Store::committed(store).unwrap();
    assert!(!manifest.tensors.is_empty());
    format!("{:?}", manifest.tensors)
}

#[test]
fn a_step_that_overflows_leaves_every_byte_of_the_state_as_it_was() {
    for moments in [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::Blocks8] {
        let case = fp16(Case::untied, moments, OVERFLOWS);
        let first = Initializer::new(&case.config, &case.layout, case.seed);
        for depth in [0, 2] {
            let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
            let plan = case.plan(depth);
            let pool = Pool::new(&plan.classes()).unwrap();
            let engine = Engine::start(EngineConfig::default(), &pool).unwrap();
            let path = folder.path().join("store");
            let volumes = [Volume { directory: path.clone(), engines: vec![engine], weight: 1 }];
            let identity = Identity::default();
            let site = Site { volumes: &volumes, durability: Durability::Step, identity: &identity };
            let mut home = SwappedHome::create(&case.layout, &plan, site, &pool, &mut drawn(&first)).unwrap();
            home.commit(&Reached::default()).unwrap();
            let before = committed(&path);
            let every_step = settings(&case, Commit::EveryStep);
            let mut trainer = Trainer::new(&case.config, &case.layout, every_step, home, Same);
            let mut skipped = 0;
            while trainer.step(&RUNNING).unwrap().skipped {
                skipped += 1;
                assert!(committed(&path) == before, "step {skipped} changed something");
                let reached = trainer.reached().unwrap();
                assert_eq!((reached.step, reached.loss_scale.unwrap().steps_skipped), (skipped, skipped));
                assert_eq!(
                    reached.loss_scale.unwrap().scale,
                    OVERFLOWS.initial_scale / 2.0_f32.powi(skipped as i32)
                );
            }
            assert!(skipped > 0);
            assert!(committed(&path) != before);
            let trained = Trained::of(&[], trainer);

            // A run that never attempted what was skipped begins with the scale that was found.
            let scale = OVERFLOWS.initial_scale / 2.0_f32.powi(skipped as i32);
            let scaler = LossScalerConfig { initial_scale: scale, ..OVERFLOWS };
            let on_demand = Settings { loss_scaler: Some(scaler), ..settings(&case, Commit::OnDemand) };
            let home = MemoryHome::new(&case.layout, &mut drawn(&first)).unwrap();
            let mut trainer = Trainer::new(&case.config, &case.layout, on_demand, home, Same);
            assert!(!trainer.step(&RUNNING).unwrap().skipped);
            assert!(Trained::of(&[], trainer) == trained, "{moments:?}, depth {depth}");
        }
    }
}
