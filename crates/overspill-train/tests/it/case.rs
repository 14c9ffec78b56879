//! What tests train, on storage and in memory, and the two laws that hold for every recipe.

use std::path::Path;
use std::sync::atomic::AtomicBool;

use overspill_io::{BackendChoice, Engine, EngineConfig, Pool};
use overspill_optim::{Isa, LossScalerConfig, MomentFormat, WeightFormat};
use overspill_swap::{Durability, Volume};
use overspill_train::config::ModelConfig;
use overspill_train::data::{Batches, Corpus, Tokenizer};
use overspill_train::home::{Home, MemoryHome, Site, SwappedHome};
use overspill_train::identity::Identity;
use overspill_train::layout::{ModelLayout, UnitLayout};
use overspill_train::model::BatchShape;
use overspill_train::optimizer::Optimizer;
use overspill_train::plan::{Fixed, MemoryPlan, StepShape};
use overspill_train::schedule::Schedule;
use overspill_train::trainer::{BatchSource, Commit, Settings, StepReport, Trainer};
use overspill_train::{Initializer, TrainError};

pub(crate) const STEPS: u64 = 4;
pub(crate) static RUNNING: AtomicBool = AtomicBool::new(false);

/// What is trained.
pub(crate) struct Case {
    pub(crate) config: ModelConfig,
    pub(crate) layout: ModelLayout,
    pub(crate) shape: StepShape,
    pub(crate) optimizer: Optimizer,
    pub(crate) loss_scaler: Option<LossScalerConfig>,
    pub(crate) seed: u64,
}

impl Case {
    /// A tied model in one micro-batch, whose embedding is its longest unit.
    pub(crate) fn tied(seed: u64) -> Self {
        let text = r#"{"vocab_size": 256, "hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "intermediate_size": 64, "tie_word_embeddings": true}"#;
        Self::new(text, StepShape { batch: BatchShape { batch: 2, seq: 24 }, accumulate: 1 }, seed)
    }

    /// An untied model in three micro-batches, whose layers are its longest units and whose tiles end unevenly.
    pub(crate) fn untied(seed: u64) -> Self {
        let text = r#"{"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 24, "intermediate_size": 200}"#;
        Self::new(text, StepShape { batch: BatchShape { batch: 1, seq: 33 }, accumulate: 3 }, seed)
    }

    pub(crate) fn new(text: &str, shape: StepShape, seed: u64) -> Self {
        let config = ModelConfig::from_json(text, Path::new("config.json")).unwrap();
        let (layout, optimizer) = (ModelLayout::new(&config), Optimizer::default());
        Self { layout, config, shape, optimizer, loss_scaler: None, seed }
    }

    /// The same with another recipe; weights in fp16 have a loss that is scaled.
    pub(crate) fn with(self, optimizer: Optimizer, weights: WeightFormat, moments: MomentFormat) -> Self {
        let layout = ModelLayout::of(&self.config, optimizer.recipe(weights, moments).unwrap());
        let scaled = weights == WeightFormat::F16WithMaster;
        Self { layout, optimizer, loss_scaler: scaled.then(LossScalerConfig::default), ..self }
    }

    pub(crate) fn plan(&self, depth: usize) -> MemoryPlan {
        // The least that will do makes the shortest tiles, so that units have many.
        let error = MemoryPlan::new(&self.config, &self.layout, self.shape, Fixed::depth(Some(depth)), 0, 0)
            .unwrap_err();
        MemoryPlan::new(&self.config, &self.layout, self.shape, Fixed::depth(Some(depth)), 0, error.least)
            .unwrap()
    }

    /// As [`Case::plan`], with memory for so many bytes beside.
    pub(crate) fn plan_with(&self, depth: usize, more: usize) -> MemoryPlan {
        let least = self.plan(depth);
        let tile_bytes = Some(least.tile_bytes());
        let fixed = Fixed { depth: Some(depth), tile_bytes, resident_bytes_max: None };
        let budget = least.total_bytes() + more;
        MemoryPlan::new(&self.config, &self.layout, self.shape, fixed, 0, budget).unwrap()
    }

    pub(crate) fn trainer<H: Home>(&self, home: H) -> Trainer<H, Batches> {
        // A gradient is shorter than the step that Adam makes of it, and Adafactor's is relative to the weights.
        let peak = match self.optimizer {
            Optimizer::Sgd(_) | Optimizer::Adafactor(_) => 0.3,
            _ => 3e-3,
        };
        let settings = Settings {
            shape: self.shape,
            schedule: Schedule { peak, warmup: 2, steps: STEPS },
            weight_decay: 0.1,
            clip: Some(0.8),
            optimizer: self.optimizer,
            loss_scaler: self.loss_scaler,
            seed: self.seed,
            isa: Isa::detect(),
            commit: Commit::OnDemand,
        };
        // Whether something is learned in so few steps depends on the text, so it is one that nobody edits.
        let text = concat!(env!("CARGO_MANIFEST_DIR"), "/../../LICENSE-APACHE").into();
        let corpus = Corpus::read(&[text], &Tokenizer::Bytes, usize::MAX, &RUNNING).unwrap();
        let batches = Batches::new(corpus, self.config.vocab, self.shape.batch, self.seed).unwrap();
        Trainer::new(&self.config, &self.layout, settings, home, batches)
    }

    pub(crate) fn in_memory(&self) -> Trained {
        let first = Initializer::new(&self.config, &self.layout, self.seed);
        let home = MemoryHome::new(&self.layout, &mut drawn(&first)).unwrap();
        Trained::by(self.trainer(home))
    }
}

/// First weights that are drawn.
pub(crate) fn drawn(first: &Initializer) -> impl FnMut(&UnitLayout, &mut [f32]) -> Result<(), TrainError> {
    |unit, weights| {
        first.fill(unit, weights);
        Ok(())
    }
}

/// What came out: losses and weights, as bits; those that the model computes with, and the exact ones.
#[derive(PartialEq, Eq)]
pub(crate) struct Trained {
    pub(crate) losses: Vec<u64>,
    pub(crate) norms: Vec<u64>,
    pub(crate) weights: Vec<u32>,
    pub(crate) masters: Vec<u32>,
}

impl Trained {
    pub(crate) fn by<H: Home>(mut trainer: Trainer<H, Batches>) -> Self {
        let reports = Self::steps(&mut trainer);
        Self::of(&reports, trainer)
    }

    /// Whether a later batch was easier than the first; a single one may be harder.
    pub(crate) fn learned(&self) -> bool {
        let losses: Vec<f64> = self.losses.iter().map(|bits| f64::from_bits(*bits)).collect();
        losses[1..].iter().any(|later| *later < losses[0])
    }

    pub(crate) fn steps<H: Home>(trainer: &mut Trainer<H, Batches>) -> Vec<StepReport> {
        (0..STEPS).map(|_| trainer.step(&RUNNING).unwrap()).collect()
    }

    pub(crate) fn of<H: Home, B: BatchSource>(reports: &[StepReport], mut trainer: Trainer<H, B>) -> Self {
        let mut weights = Vec::new();
        trainer
            .weights(|unit, values| {
                let parameters =
                    unit.parameters.iter().flat_map(|parameter| &values[parameter.range.clone()]);
                weights.extend(parameters.map(|value| value.to_bits()));
                Ok(())
            })
            .unwrap();
        let mut masters = Vec::new();
        trainer
            .masters(|unit, start, values| {
                for (range, _) in unit.parameters_within(start..start + values.len()) {
                    let part = &values[range.start - start..range.end - start];
                    masters.extend(part.iter().map(|value| value.to_bits()));
                }
                Ok(())
            })
            .unwrap();
        Self {
            masters,
            losses: reports.iter().map(|report| report.loss.to_bits()).collect(),
            norms: reports.iter().map(|report| report.gradient_norm.to_bits()).collect(),
            weights,
        }
    }
}

/// A swapped run's surroundings; fields are dropped from top to bottom.
pub(crate) struct Storage {
    pub(crate) trainer: Trainer<SwappedHome, Batches>,
    pub(crate) pool: Pool,
    pub(crate) folder: tempfile::TempDir,
}

impl Storage {
    pub(crate) fn new(case: &Case, depth: usize, backend: BackendChoice) -> Self {
        Self::over(case, depth, &[(1, &[backend])])
    }

    /// Over volumes with these weights, and an engine for each of the backends.
    pub(crate) fn over(case: &Case, depth: usize, volumes: &[(u32, &[BackendChoice])]) -> Self {
        Self::planned(case, &case.plan(depth), volumes)
    }

    pub(crate) fn planned(case: &Case, plan: &MemoryPlan, volumes: &[(u32, &[BackendChoice])]) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let pool = Pool::new(&plan.classes()).unwrap();
        let engine = |backend: &BackendChoice| {
            let config = EngineConfig { backend: *backend, ..EngineConfig::default() };
            Engine::start(config, &pool).unwrap()
        };
        let volume = |(name, &(weight, backends)): (&str, &(u32, &[BackendChoice]))| Volume {
            directory: folder.path().join(name),
            engines: backends.iter().map(engine).collect(),
            weight,
        };
        let volumes: Vec<_> = ["store", "second", "third"].into_iter().zip(volumes).map(volume).collect();
        let first = Initializer::new(&case.config, &case.layout, case.seed);
        let fill = &mut drawn(&first);
        let identity = Identity::default();
        let site = Site { volumes: &volumes, durability: Durability::None, identity: &identity };
        let home = SwappedHome::create(&case.layout, plan, site, &pool, fill).unwrap();
        Self { trainer: case.trainer(home), pool, folder }
    }
}

/// Trains on storage with nothing, a part, and everything in memory for good; returns the reference.
pub(crate) fn equals_in_memory(case: &Case) -> Trained {
    let reference = case.in_memory();
    let recipe = case.layout.state_recipe();
    assert!(reference.learned(), "{recipe:?} learns");
    let rounds = matches!(recipe.weights(), WeightFormat::Bf16WithRemainder | WeightFormat::F16WithMaster);
    assert_eq!(reference.masters != reference.weights, rounds, "{recipe:?}");
    let inputs = case.plan(0).saved_inputs() * case.plan(0).input_bytes();
    let state = case.layout.state_bytes(case.plan(0).tile_elements()) + inputs;
    for depth in [0, 2] {
        let mut moved = Vec::new();
        // Of the room, an eighth is left alone.
        for quarters in [0, 2, 5] {
            let plan = case.plan_with(depth, state * quarters / 4 * 8 / 7 + 64);
            let mut storage = Storage::planned(case, &plan, &[(1, &[BackendChoice::Auto])]);
            let initially = storage.trainer.home().io().unwrap();
            let reports = Trained::steps(&mut storage.trainer);
            storage.trainer.home().settle().unwrap();
            let io = storage.trainer.home().io().unwrap().since(&initially);
            moved.push(io.bytes_read + io.bytes_written);
            let step = plan.traffic(&case.layout, Durability::None);
            assert_eq!(io.bytes_written, STEPS * step.bytes_written, "{recipe:?}");
            assert_eq!(io.bytes_read, STEPS * step.bytes_read, "{recipe:?}");
            let trained = Trained::of(&reports, storage.trainer);
            assert!(trained == reference, "{recipe:?}, {quarters} quarters, depth {depth}");
            assert_eq!(storage.pool.leased_blocks(), 0);
        }
        assert!(moved[1] < moved[0] && moved[2] == 0, "{recipe:?}: {moved:?}");
    }
    reference
}

/// Ends the run after every step, goes on from what was committed, and finds the bits of one that was not ended.
pub(crate) fn is_resumed(case: &Case) {
    let reference = case.in_memory();
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let plan = case.plan(1);
    let pool = Pool::new(&plan.classes()).unwrap();
    let engine = Engine::start(EngineConfig::default(), &pool).unwrap();
    let volumes = [Volume { directory: folder.path().join("store"), engines: vec![engine], weight: 1 }];
    let identity = Identity::default().with("--seed", &case.seed);
    let site = Site { volumes: &volumes, durability: Durability::Step, identity: &identity };
    let first = Initializer::new(&case.config, &case.layout, case.seed);
    let home = SwappedHome::create(&case.layout, &plan, site, &pool, &mut drawn(&first)).unwrap();
    home.keep();
    let mut trainer = case.trainer(home);
    let mut losses = Vec::new();
    for step in 1..=STEPS {
        losses.push(trainer.step(&RUNNING).unwrap().loss.to_bits());
        let reached = trainer.reached().unwrap();
        trainer.home().commit(&reached).unwrap();
        if step == 2 {
            // A step that is never committed is as if it had not been.
            let lost = trainer.step(&RUNNING).unwrap();
            assert_eq!(lost.loss.to_bits(), reference.losses[2]);
        }
        drop(trainer);
        let (home, found) = SwappedHome::open(&case.layout, &plan, site, &pool).unwrap();
        assert_eq!(found, reached);
        trainer = case.trainer(home).after(&found);
    }
    assert_eq!(losses, reference.losses, "{:?}", case.layout.state_recipe());
    let resumed = Trained::of(&[], trainer);
    assert!(resumed.masters == reference.masters, "{:?}", case.layout.state_recipe());
    let other = Identity::default().with("--seed", &(case.seed + 1));
    let refused =
        SwappedHome::open(&case.layout, &plan, Site { identity: &other, ..site }, &pool).unwrap_err();
    assert!(matches!(&refused, TrainError::OtherRun { what, .. } if what == "--seed"), "{refused}");
}
