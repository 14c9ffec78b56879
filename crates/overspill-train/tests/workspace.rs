//! Bounds on memory that the plan relies on, against what the allocator sees.
#![expect(unsafe_code, reason = "a global allocator that counts is an unsafe trait")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed, its helpers too")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};
use std::sync::{Mutex, PoisonError};

use overspill_io::{Engine, EngineConfig, Pool};
use overspill_optim::{AdafactorConfig, AdamWConfig, Isa, MomentFormat, MuonConfig, WeightFormat};
use overspill_swap::{Durability, Volume};
use overspill_train::config::{ModelConfig, Rope};
use overspill_train::home::{GradientStart, Home, MemoryHome, Site, SwappedHome, Update};
use overspill_train::identity::{Identity, Reached};
use overspill_train::layout::{ModelLayout, Unit};
use overspill_train::model::{Activations, BatchShape, Model, Weights};
use overspill_train::optimizer::Optimizer;
use overspill_train::plan::{Fixed, MemoryPlan, StepShape, TILE_RECORD_BYTES};

struct Counting;

static LIVE: AtomicIsize = AtomicIsize::new(0);
static PEAK: AtomicIsize = AtomicIsize::new(0);

impl Counting {
    fn count(change: isize) {
        let live = LIVE.fetch_add(change, Ordering::SeqCst) + change;
        PEAK.fetch_max(live, Ordering::SeqCst);
    }
}

// SAFETY: every request goes to the system's allocator unchanged; counting neither allocates nor unwinds.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size().cast_signed());
        // SAFETY: the caller's promises about `layout` are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count(layout.size().cast_signed());
        // SAFETY: as in `alloc`; the default would touch every page, which the system's need not.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        Self::count(-layout.size().cast_signed());
        // SAFETY: `pointer` came from `System` with this `layout`, because `alloc` took it from there.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// The most `f` allocated at a time, in bytes.
fn peak_of<T>(f: impl FnOnce() -> T) -> usize {
    let before = LIVE.load(Ordering::SeqCst);
    PEAK.store(before, Ordering::SeqCst);
    drop(f());
    usize::try_from(PEAK.load(Ordering::SeqCst) - before).expect("the peak is not below the start")
}

struct Peaks {
    forward: usize,
    backward: usize,
    head: usize,
}

fn measure(config: &ModelConfig, shape: BatchShape) -> Peaks {
    let layout = ModelLayout::new(config);
    let model = Model::new(config, shape);
    let block = |unit| bytes::Bytes::from(vec![0u8; layout.unit(unit).padded_bytes()]);
    let (embedding, layer, head) = (block(Unit::Embedding), block(Unit::Layer(0)), block(Unit::Head));
    let embedding = Weights::new(layout.unit(Unit::Embedding), embedding);
    let layer = Weights::new(layout.unit(Unit::Layer(0)), layer);
    let head = Weights::new(layout.unit(Unit::Head), head);
    let tied = config.tied.then_some(&embedding);
    let ids = vec![0u32; shape.tokens()];
    let input: Activations = model.embed(&embedding, &ids);
    let mut sink = |_: Unit, _: std::ops::Range<usize>, _: &[f32]| {};
    Peaks {
        forward: peak_of(|| model.layer_forward(&layer, &input)),
        backward: peak_of(|| model.layer_backward(&layer, &input, input.clone(), &mut sink)),
        head: peak_of(|| model.head_backward(&head, tied, &input, &ids, 1.0, &mut sink)),
    }
}

fn config(hidden: usize, heads: (usize, usize, usize), ffn: usize, vocab: usize) -> ModelConfig {
    let (heads, kv_heads, head_dim) = heads;
    ModelConfig {
        vocab,
        hidden,
        layers: 1,
        heads,
        kv_heads,
        head_dim,
        ffn,
        norm_eps: 1e-5,
        rope: Rope { theta: 10_000.0, scaling: None },
        tied: vocab.is_multiple_of(2),
        max_positions: 4096,
        initializer_range: 0.02,
    }
}

/// Held by each test of this binary: what another one allocates would be counted, too.
static ALONE: Mutex<()> = Mutex::new(());

fn update(stop: &AtomicBool) -> Update<'_> {
    Update {
        optimizer: Optimizer::default(),
        learning_rate: 1e-3,
        weight_decay: 0.1,
        update: 1,
        gradient_scale: 1.0,
        seed: 0,
        isa: Isa::detect(),
        stop,
    }
}

/// Tiles of a model of so many layers, and the most that its state on storage and one update of it take of the heap.
fn bookkeeping(layers: usize) -> (usize, usize) {
    let config = ModelConfig { layers, ..config(512, (8, 4, 64), 1408, 257) };
    let layout = ModelLayout::new(&config);
    let shape = StepShape { batch: BatchShape { batch: 1, seq: 16 }, accumulate: 1 };
    let fixed = Fixed { depth: Some(2), tile_bytes: Some(64 << 10), resident_bytes_max: Some(0) };
    let plan = MemoryPlan::new(&config, &layout, shape, fixed, 0, usize::MAX).unwrap();
    let pool = Pool::new(&plan.classes()).unwrap();
    let engines = vec![Engine::start(EngineConfig::default(), &pool).unwrap()];
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let volumes = [Volume { directory: folder.path().join("store"), engines, weight: 1 }];
    let identity = Identity::default();
    let site = Site { volumes: &volumes, durability: Durability::Step, identity: &identity };
    let stop = AtomicBool::new(false);
    let update = update(&stop);
    let peak = peak_of(|| {
        let mut home = SwappedHome::create(&layout, &plan, site, &pool, &mut |_, _| Ok(())).unwrap();
        for unit in layout.units() {
            let gradient = home.gradient(unit.unit, GradientStart::Zero).unwrap();
            home.put_gradient(unit.unit, gradient).unwrap();
        }
        home.update(&update).unwrap();
        home.commit(&Reached { step: 1, loss_scale: None }).unwrap();
        home
    });
    (layout.units().iter().map(|unit| unit.padded.div_ceil(plan.tile_elements())).sum(), peak)
}

#[test]
fn the_plan_counts_what_the_tables_take_for_a_tile_and_not_twice_that() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let ((few, small), (many, large)) = (bookkeeping(2), bookkeeping(8));
    let per_tile = (large - small) / (many - few);
    let figures = format!("{per_tile} bytes for each of {many} tiles, {TILE_RECORD_BYTES} in the plan");
    assert!(per_tile <= TILE_RECORD_BYTES, "{figures}");
    assert!(TILE_RECORD_BYTES <= 2 * per_tile, "{figures}");
}

#[test]
fn the_plan_counts_what_the_update_of_a_whole_parameter_takes_and_not_twice_that() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let config = config(256, (4, 2, 64), 704, 900);
    let stop = AtomicBool::new(false);
    let adamw = AdamWConfig::default();
    let muon = Optimizer::Muon { muon: MuonConfig::default(), adamw };
    for optimizer in [Optimizer::Adafactor(AdafactorConfig::default()), muon] {
        for weights in [WeightFormat::F32, WeightFormat::F16WithMaster] {
            let layout = ModelLayout::of(&config, optimizer.recipe(weights, MomentFormat::F32).unwrap());
            let mut home = MemoryHome::new(&layout, &mut |_, values| {
                values.fill(0.5);
                Ok(())
            })
            .unwrap();
            for unit in layout.units() {
                let mut gradient = home.gradient(unit.unit, GradientStart::Zero).unwrap();
                gradient.iter_mut().zip(0..).for_each(|(x, i)| *x = (i % 7 - 3) as f32);
                home.put_gradient(unit.unit, gradient).unwrap();
            }
            let update = Update { optimizer, ..update(&stop) };
            // The first one makes what threads keep for good.
            home.update(&update).unwrap();
            let peak = peak_of(|| home.update(&update).unwrap());
            let bound = layout.update_workspace_bytes();
            let figures = format!("{optimizer:?} {weights:?}: {peak} bytes, {bound} in the plan");
            assert!(peak <= bound, "{figures}");
            assert!(bound <= 2 * peak, "{figures}");
        }
    }
}

#[test]
fn parameters_are_not_copied_and_the_workspace_bounds_every_call_without_being_twice_the_peak() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let shapes = [
        (config(512, (8, 4, 64), 1408, 257), 2, 128),
        (config(512, (8, 4, 64), 1408, 257), 4, 256),
        (config(256, (4, 1, 64), 512, 32_000), 1, 300),
        (config(256, (2, 2, 128), 300, 64_001), 2, 64),
        (config(64, (8, 4, 32), 96, 300), 2, 1024),
        (config(768, (12, 12, 64), 2048, 1000), 1, 64),
        (config(96, (3, 3, 32), 1024, 100), 3, 333),
        (config(128, (16, 2, 64), 64, 100), 2, 200),
        (config(1024, (4, 4, 32), 256, 100), 1, 16),
        (config(64, (64, 1, 2), 64, 500), 1, 700),
    ];
    // The first products on each thread allocate the packing buffers that stay.
    let wide = config(1024, (16, 16, 64), 2048, 64);
    for _ in 0..4 {
        measure(&shapes[1].0, BatchShape { batch: 4, seq: 256 });
        measure(&wide, BatchShape { batch: 1, seq: 4 });
    }
    // With hardly any activations, a single copy of a matrix on the way forward would stand out.
    let forward = measure(&wide, BatchShape { batch: 1, seq: 4 }).forward;
    assert!(forward < 1024 * 1024 * size_of::<f32>(), "{forward} bytes: a parameter was copied");

    for (config, batch, seq) in shapes {
        let shape = BatchShape { batch, seq };
        let Peaks { forward, backward, head } = measure(&config, shape);
        let bound = Model::workspace_bytes(&config, shape);
        let peak = forward.max(backward).max(head);
        let figures = format!("{shape:?} {config:?}: {forward} {backward} {head}, bound {bound}");
        assert!(peak <= bound, "{figures}");
        assert!(bound <= 2 * peak, "{figures}");
    }
}
