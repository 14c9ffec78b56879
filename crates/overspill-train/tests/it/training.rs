//! Training on storage is training in memory: the same bits, whatever the seed, the shape, the depth, the backend.

use std::collections::BTreeSet;
use std::sync::atomic::AtomicBool;

use overspill_io::{BackendChoice, Engine, EngineConfig, Pool};
use overspill_optim::{AdagradConfig, AdamWConfig, Isa, LionConfig, MomentFormat, SgdConfig, WeightFormat};
use overspill_swap::{Durability, StoreError, Volume};
use overspill_train::home::{GradientStart, Home, MemoryHome, Site, SwappedHome, Update};
use overspill_train::identity::{Identity, Reached};
use overspill_train::model::BatchShape;
use overspill_train::optimizer::Optimizer;
use overspill_train::plan::StepShape;
use overspill_train::schedule::Schedule;
use overspill_train::trainer::{BatchSource, Commit, Settings, Trainer};
use overspill_train::{Initializer, TrainError};

use crate::case::{Case, RUNNING, STEPS, Storage, Trained, drawn, equals_in_memory, is_resumed};

#[test]
fn who_stops_looking_at_the_exact_weights_leaves_the_state_as_it_is() {
    let recipe =
        |case: Case| case.with(Optimizer::default(), WeightFormat::Bf16WithRemainder, MomentFormat::Bf16);
    let case = recipe(Case::untied(3));
    let reference = case.in_memory();
    for more in [0, 64 << 20] {
        let volumes: &[(u32, &[BackendChoice])] = &[(1, &[BackendChoice::Auto])];
        let Storage { mut trainer, pool: _pool, folder: _folder } =
            Storage::planned(&case, &case.plan_with(1, more), volumes);
        let mut reports = Vec::new();
        for _ in 0..STEPS {
            reports.push(trainer.step(&RUNNING).unwrap());
            let refused = trainer.masters(|_, _, _| Err(TrainError::Interrupted));
            assert!(matches!(refused, Err(TrainError::Interrupted)));
        }
        assert!(Trained::of(&reports, trainer) == reference);
    }
}

fn swapped_equals_in_memory(case: fn(u64) -> Case) {
    let mut seeds = Vec::new();
    for seed in [1, 2] {
        let case = case(seed);
        let reference = case.in_memory();
        assert!(reference.learned(), "it learns");
        for backend in [BackendChoice::Uring, BackendChoice::Threads] {
            for depth in [0, 2] {
                let storage = Storage::new(&case, depth, backend);
                let swapped = Trained::by(storage.trainer);
                assert_eq!(swapped.losses, reference.losses, "seed {seed}, {backend}, depth {depth}");
                assert!(swapped == reference, "seed {seed}, {backend}, depth {depth}");
                assert_eq!(storage.pool.leased_blocks(), 0);
            }
        }
        seeds.push(reference);
    }
    assert!(seeds[0] != seeds[1], "the seed matters");
}

#[test]
fn a_tied_model_trains_to_the_same_bits_on_storage_and_in_memory() {
    swapped_equals_in_memory(Case::tied);
}

#[test]
fn an_untied_model_with_accumulation_trains_to_the_same_bits_on_storage_and_in_memory() {
    swapped_equals_in_memory(Case::untied);
}

#[test]
fn volumes_and_engines_of_any_number_train_to_the_same_bits() {
    use BackendChoice::{Threads, Uring};
    let case = Case::untied(1);
    let reference = case.in_memory();
    for volumes in [
        &[(1, &[Uring][..]), (1, &[Threads])][..],
        &[(3, &[Uring, Uring])],
        &[(2, &[Uring, Threads]), (1, &[Uring])],
    ] {
        let storage = Storage::over(&case, 2, volumes);
        assert!(Trained::by(storage.trainer) == reference, "{volumes:?}");
        assert_eq!(storage.pool.leased_blocks(), 0);
        assert_eq!(std::fs::read_dir(storage.folder.path()).unwrap().count(), 0);
    }
}

#[test]
fn any_share_that_stays_in_memory_gives_the_same_bits_and_moves_what_does_not_stay() {
    for case in [Case::tied(3), Case::untied(4)] {
        let reference = case.in_memory();
        let state = 4 * case.layout.padded_bytes();
        let inputs = case.plan(0).saved_inputs() * case.plan(0).input_bytes();
        let mut moved = Vec::new();
        // Of the room, an eighth is left alone.
        for eighths in [0, 1, 2, 3, 5, 8, 9] {
            for depth in [0, 2] {
                let plan = case.plan_with(depth, (state + inputs) * eighths / 8 * 8 / 7 + 64);
                let mut storage = Storage::planned(&case, &plan, &[(1, &[BackendChoice::Auto])]);
                let initially = storage.trainer.home().io().unwrap();
                let reports = Trained::steps(&mut storage.trainer);
                storage.trainer.home().settle().unwrap();
                let io = storage.trainer.home().io().unwrap().since(&initially);
                moved.push(io.bytes_read + io.bytes_written);
                assert!(
                    Trained::of(&reports, storage.trainer) == reference,
                    "{eighths} eighths, depth {depth}"
                );
                assert_eq!(storage.pool.leased_blocks(), 0);
            }
        }
        let pairs: Vec<&[u64]> = moved.chunks(2).collect();
        assert!(pairs.windows(2).all(|pair| pair[1][0] <= pair[0][0]), "{moved:?}");
        assert!(moved[2] < moved[0] && moved[8] < moved[2] / 2, "{moved:?}");
        assert_eq!(&moved[10..], [0; 4], "everything stays");
    }
}

/// Every rule that works element by element.
fn optimizers() -> [Optimizer; 6] {
    let sgd = |momentum| Optimizer::Sgd(SgdConfig { momentum, ..SgdConfig::default() });
    [
        Optimizer::default(),
        Optimizer::Adam(AdamWConfig::default()),
        sgd(0.0),
        sgd(0.9),
        Optimizer::Adagrad(AdagradConfig::default()),
        Optimizer::Lion(LionConfig::default()),
    ]
}

/// Every way to keep the state.
fn formats() -> impl Iterator<Item = (WeightFormat, MomentFormat)> {
    let weights = [WeightFormat::F32, WeightFormat::Bf16WithRemainder, WeightFormat::Bf16Stochastic];
    let moments = [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::Blocks8];
    weights.into_iter().flat_map(move |weights| moments.map(|moments| (weights, moments)))
}

fn every_recipe_equals_in_memory(case: fn(u64) -> Case) {
    for optimizer in optimizers() {
        let mut losses = Vec::new();
        for (weights, moments) in formats() {
            losses.push(equals_in_memory(&case(7).with(optimizer, weights, moments)).losses);
        }
        let keeps_moments = optimizer != optimizers()[2];
        let differing = losses.iter().collect::<BTreeSet<_>>().len();
        assert_eq!(differing, if keeps_moments { 9 } else { 3 }, "{optimizer:?}");
    }
}

#[test]
fn a_tied_model_trains_to_the_same_bits_on_storage_and_in_memory_by_every_recipe() {
    every_recipe_equals_in_memory(Case::tied);
}

#[test]
fn an_untied_model_trains_to_the_same_bits_on_storage_and_in_memory_by_every_recipe() {
    every_recipe_equals_in_memory(Case::untied);
}

#[test]
fn adamw_in_single_precision_has_the_record_that_older_stores_have() {
    let case = Case::untied(1);
    let plan = case.plan(1);
    let tile = plan.tile_elements();
    for unit in case.layout.units() {
        for piece in unit.pieces(tile) {
            let (elements, record) = (piece.elements(), piece.record());
            let fields: Vec<_> = record.fields().iter().map(|field| (field.name, field.bytes())).collect();
            let bytes = elements * size_of::<f32>();
            assert_eq!(fields, [("exp_avg", 0..bytes), ("exp_avg_sq", bytes..2 * bytes)]);
            assert_eq!(piece.record_bytes(), 2 * bytes);
        }
        assert_eq!(case.layout.records_bytes(unit, tile), 2 * unit.padded_bytes());
        assert_eq!(case.layout.weights_bytes(unit), unit.padded_bytes());
    }
}

/// The same tokens for every step: as one batch, or cut into micro-batches.
struct Whole {
    ids: Vec<u32>,
    batch: usize,
}

impl BatchSource for Whole {
    fn fill(&self, _step: u64, micro: usize, inputs: &mut Vec<u32>, targets: &mut Vec<u32>) {
        let tokens = self.batch * 24;
        let rows = &self.ids[micro * tokens..(micro + 1) * tokens];
        inputs.extend(rows);
        targets.extend(rows.iter().map(|id| (id + 1) % 256));
    }
}

#[test]
fn micro_batches_add_up_to_the_batch_they_are_parts_of() {
    let ids: Vec<u32> = (0..48).map(|i| (i * 37 % 256) as u32).collect();
    let loss = |batch, accumulate| {
        let case = Case::new(
            r#"{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                "intermediate_size": 32}"#,
            StepShape { batch: BatchShape { batch, seq: 24 }, accumulate },
            3,
        );
        let first = Initializer::new(&case.config, &case.layout, case.seed);
        let home = MemoryHome::new(&case.layout, &mut drawn(&first)).unwrap();
        let settings = Settings {
            shape: case.shape,
            schedule: Schedule { peak: 1e-2, warmup: 0, steps: 3 },
            weight_decay: 0.0,
            clip: None,
            optimizer: case.optimizer,
            loss_scaler: None,
            seed: 0,
            isa: Isa::detect(),
            commit: Commit::OnDemand,
        };
        let mut trainer =
            Trainer::new(&case.config, &case.layout, settings, home, Whole { ids: ids.clone(), batch });
        (0..3).map(|_| trainer.step(&RUNNING).unwrap().loss).collect::<Vec<_>>()
    };
    for (whole, halves) in loss(2, 1).into_iter().zip(loss(1, 2)) {
        assert!((whole - halves).abs() < 1e-4 * whole, "{whole} and {halves}");
    }
}

#[test]
fn a_resumed_run_has_the_bits_of_one_that_was_never_interrupted() {
    let recipes = optimizers().into_iter().flat_map(|rule| formats().map(move |formats| (rule, formats)));
    let cases = recipes.enumerate().map(|(i, (optimizer, (weights, moments)))| {
        let case = if i.is_multiple_of(2) { Case::tied(5) } else { Case::untied(6) };
        case.with(optimizer, weights, moments)
    });
    cases.for_each(|case| is_resumed(&case));
}

#[test]
fn damage_on_storage_ends_the_run_and_names_the_tensor() {
    let case = Case::untied(1);
    let mut storage = Storage::new(&case, 2, BackendChoice::Auto);
    storage.trainer.step(&RUNNING).unwrap();
    let data = storage.folder.path().join("store/data");
    let mut bytes = std::fs::read(&data).unwrap();
    let middle = bytes.len() / 2;
    bytes[..middle].iter_mut().for_each(|byte| *byte ^= 1);
    std::fs::write(&data, bytes).unwrap();
    let error = storage.trainer.step(&RUNNING).unwrap_err();
    assert!(
        matches!(&error, TrainError::Store(StoreError::Corrupt { tensor, .. }) if tensor.starts_with("weights/embedding")),
        "{error}"
    );
    assert!(
        matches!(storage.trainer.step(&RUNNING), Err(TrainError::Lost { left: None })),
        "there is no state to go on from"
    );
    drop(storage.trainer);
    assert_eq!(storage.pool.leased_blocks(), 0);
    assert!(!storage.folder.path().join("store").exists());
}

#[test]
fn a_lost_step_says_what_is_left_to_go_on_from() {
    let case = Case::untied(1);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let plan = case.plan(1);
    let pool = Pool::new(&plan.classes()).unwrap();
    let engine = Engine::start(EngineConfig::default(), &pool).unwrap();
    let path = folder.path().join("store");
    let volumes = [Volume { directory: path.clone(), engines: vec![engine], weight: 1 }];
    let identity = Identity::default();
    let site = Site { volumes: &volumes, durability: Durability::Step, identity: &identity };
    let first = Initializer::new(&case.config, &case.layout, case.seed);
    let home = SwappedHome::create(&case.layout, &plan, site, &pool, &mut drawn(&first)).unwrap();
    let mut trainer = case.trainer(home);
    trainer.step(&RUNNING).unwrap();
    trainer.home().commit(&Reached { step: 1, loss_scale: None }).unwrap();
    assert_eq!(trainer.home().left(), None, "it goes with its run");
    trainer.home().keep();
    std::fs::File::options().write(true).open(path.join("data")).unwrap().set_len(0).unwrap();
    trainer.step(&RUNNING).unwrap_err();
    let lost = trainer.step(&RUNNING).unwrap_err();
    assert!(
        matches!(&lost, TrainError::Lost { left: Some(left) } if left.step == 1 && left.path == path),
        "{lost}"
    );
    assert!(lost.to_string().contains("--resume"), "{lost}");
}

#[test]
fn a_step_that_was_stopped_can_be_taken_again_with_the_same_bits() {
    let case = Case::untied(1);
    let reference = case.in_memory();
    let mut storage = Storage::new(&case, 2, BackendChoice::Auto);
    let first = storage.trainer.step(&RUNNING).unwrap();
    let error = storage.trainer.step(&AtomicBool::new(true)).unwrap_err();
    assert!(matches!(error, TrainError::Interrupted));
    let second = storage.trainer.step(&RUNNING).unwrap();
    assert_eq!([first.loss.to_bits(), second.loss.to_bits()], reference.losses[..2]);
    drop(storage.trainer);
    assert_eq!(storage.pool.leased_blocks(), 0);
    assert!(!storage.folder.path().join("store").exists());
}

#[test]
fn a_run_that_diverges_says_so_instead_of_training_on() {
    for (weights, moments) in formats() {
        let case = Case::tied(1).with(Optimizer::default(), weights, moments);
        let first = Initializer::new(&case.config, &case.layout, case.seed);
        let home = MemoryHome::new(&case.layout, &mut |unit, weights| {
            first.fill(unit, weights);
            weights[0] = f32::NAN;
            Ok(())
        })
        .unwrap();
        let error = case.trainer(home).step(&RUNNING).unwrap_err();
        assert!(matches!(error, TrainError::Diverged { step: 1, .. }), "{weights:?} {moments:?}: {error}");
    }
}

#[test]
#[should_panic(expected = "a gradient whose norm is finite")]
fn a_gradient_that_is_no_number_never_becomes_a_state() {
    let case = Case::tied(1).with(Optimizer::default(), WeightFormat::F32, MomentFormat::Blocks8);
    let mut home = MemoryHome::new(&case.layout, &mut |_, _| Ok(())).unwrap();
    for unit in case.layout.units() {
        let mut gradient = home.gradient(unit.unit, GradientStart::Zero).unwrap();
        gradient[unit.parameters[0].range.start] = f32::INFINITY;
        home.put_gradient(unit.unit, gradient).unwrap();
    }
    let update = Update {
        optimizer: case.optimizer,
        learning_rate: 1e-3,
        weight_decay: 0.0,
        update: 1,
        gradient_scale: 1.0,
        seed: 0,
        isa: Isa::detect(),
        stop: &RUNNING,
    };
    home.update(&update).unwrap();
}
