//! Optimizer state that lives on storage, beside the same state in memory.

use std::ops::Range;
use std::path::Path;

use overspill_io::{BackendChoice, Engine, EngineConfig, Pool};
use overspill_swap::optimizer::{
    OptimizerError, OptimizerPlan, OptimizerSwapper, ParameterSpec, PartView, PassError, PlanOptions,
    StateSize, is_swappable,
};
use overspill_swap::pipeline::items_in_memory;
use overspill_swap::{Durability, Store, StoreError};
use serde_json::json;
use tempfile::TempDir;

const STATE_BYTES: usize = 6;
const GRADIENT_BYTES: usize = 4;
const TILE_BYTES: usize = 32 << 10;

fn specs() -> Vec<ParameterSpec> {
    let state = StateSize::per_element(STATE_BYTES);
    let lengths = [70_001, 12, 1000, 40_000, 1, 5461, 20_000];
    let mut specs: Vec<ParameterSpec> = lengths
        .into_iter()
        .enumerate()
        .map(|(i, numel)| ParameterSpec {
            name: format!("p{i}"),
            numel,
            state: state.clone(),
            begins_tile: false,
        })
        .collect();
    specs.push(ParameterSpec {
        name: "matrix".to_owned(),
        numel: 9000,
        state: StateSize::Whole(50_000),
        begins_tile: false,
    });
    specs
}

/// Fields are dropped from top to bottom.
struct Rig {
    swapper: OptimizerSwapper,
    engine: Engine,
    folder: TempDir,
}

fn options(kept_of_ten: usize, depth: usize) -> PlanOptions {
    let all = PlanOptions {
        memory_bytes: usize::MAX,
        kept_bytes_max: None,
        depth: Some(depth),
        tile_bytes: Some(TILE_BYTES),
        gradient_bytes: Some(GRADIENT_BYTES),
    };
    let whole = OptimizerPlan::new(&specs(), &all).unwrap().total_bytes();
    let least = match OptimizerPlan::new(&specs(), &PlanOptions { memory_bytes: 1, ..all }) {
        Err(error) => error.least_bytes,
        Ok(_) => panic!("a byte is too little"),
    };
    PlanOptions { memory_bytes: least + (whole - least) * kept_of_ten / 10, ..all }
}

fn start(options: &PlanOptions) -> (OptimizerPlan, Pool, Engine) {
    start_with(options, BackendChoice::Auto)
}

fn start_with(options: &PlanOptions, backend: BackendChoice) -> (OptimizerPlan, Pool, Engine) {
    let plan = OptimizerPlan::new(&specs(), options).unwrap();
    let pool = Pool::new(&plan.classes()).unwrap();
    let engine = Engine::start(EngineConfig { backend, ..EngineConfig::default() }, &pool).unwrap();
    (plan, pool, engine)
}

fn path(folder: &TempDir) -> std::path::PathBuf {
    folder.path().join("store")
}

impl Rig {
    fn new(options: &PlanOptions, durability: Durability) -> Self {
        Self::with(options, durability, BackendChoice::Auto)
    }

    fn with(options: &PlanOptions, durability: Durability, backend: BackendChoice) -> Self {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let (plan, pool, engine) = start_with(options, backend);
        let store =
            Store::create(&path(&folder), durability, plan.storage_bytes(durability), &engine).unwrap();
        store.keep();
        let swapper = OptimizerSwapper::create(&specs(), plan, &store, &pool).unwrap();
        Self { swapper, engine, folder }
    }

    /// Ends the process, as it were, and begins another one.
    fn reopen(self, options: &PlanOptions) -> Self {
        let Self { swapper, engine, folder } = self;
        drop((swapper, engine));
        let (plan, pool, engine) = start(options);
        let store = Store::open(&path(&folder), Durability::Step, &engine).unwrap();
        let swapper = OptimizerSwapper::open(&specs(), plan, &store, &pool).unwrap();
        Self { swapper, engine, folder }
    }

    fn bytes_moved(&self) -> (u64, u64) {
        let stats = self.engine.stats();
        (stats.bytes_read, stats.bytes_written)
    }

    /// All state, parameter by parameter.
    fn state(&mut self) -> Vec<Vec<u8>> {
        let mut state = vec![Vec::new(); specs().len()];
        let read = self.swapper.read(
            |_| true,
            |parameter, _, bytes| {
                state[parameter].extend_from_slice(bytes);
                Ok::<(), String>(())
            },
        );
        read.unwrap();
        state
    }
}

fn gradient(parameter: usize, step: usize, elements: Range<usize>) -> Vec<u8> {
    let word = |element: usize| ((element * 31 + parameter * 7 + step * 1009) as u32).to_le_bytes();
    elements.flat_map(word).collect()
}

/// Puts all gradients out, in pieces that cross tiles, out of their order, and some of them twice.
fn put_gradients(swapper: &mut OptimizerSwapper, step: usize) {
    for (parameter, spec) in specs().iter().enumerate() {
        // One of them all at once.
        let piece = if parameter == 3 { spec.numel } else { 3000 + 500 * parameter };
        let starts = (0..spec.numel).step_by(piece).rev();
        let pieces: Vec<Range<usize>> = starts.map(|start| start..(start + piece).min(spec.numel)).collect();
        let wrong = gradient(parameter, step + 1, pieces[0].clone());
        swapper.swap_out_gradient(parameter, pieces[0].start, &wrong).unwrap();
        for range in pieces {
            let bytes = gradient(parameter, step, range.clone());
            swapper.swap_out_gradient(parameter, range.start, &bytes).unwrap();
        }
    }
}

/// What a step does to a part: something that depends on everything it is given.
#[expect(clippy::needless_pass_by_value, reason = "a step's computation takes what it is given")]
fn mix(part: PartView<'_>) -> Result<(), String> {
    let gradient = part.gradient.ok_or("no gradient")?;
    for (i, byte) in part.state.iter_mut().enumerate() {
        let element = (i / STATE_BYTES).min(part.elements.len() - 1);
        let from = gradient[element * GRADIENT_BYTES + i % STATE_BYTES % GRADIENT_BYTES];
        *byte = byte.wrapping_mul(3).wrapping_add(from) ^ (part.elements.start + element) as u8;
        if part.is_new {
            *byte = byte.wrapping_add(1);
        }
    }
    Ok(())
}

fn take_step(swapper: &mut OptimizerSwapper, step: usize) {
    put_gradients(swapper, step);
    swapper.flush_gradients().unwrap();
    swapper.prefetch().unwrap();
    swapper.step(|_| true, mix).unwrap();
}

/// The same in memory: every parameter is one part.
fn reference(steps: usize) -> Vec<Vec<u8>> {
    let mut state: Vec<Vec<u8>> = specs().iter().map(|spec| vec![0; spec.state.bytes(spec.numel)]).collect();
    for step in 0..steps {
        for (parameter, (spec, state)) in specs().iter().zip(&mut state).enumerate() {
            let gradient = gradient(parameter, step, 0..spec.numel);
            let view = PartView {
                parameter,
                elements: 0..spec.numel,
                state,
                is_new: step == 0,
                gradient: Some(&gradient),
            };
            mix(view).unwrap();
        }
    }
    state
}

#[test]
fn every_depth_backend_and_share_in_memory_gives_the_bits_of_memory() {
    for backend in [BackendChoice::Auto, BackendChoice::Threads] {
        for (depth, kept) in [(0, 0), (1, 0), (3, 0), (0, 4), (2, 4), (2, 10)] {
            let mut rig = Rig::with(&options(kept, depth), Durability::None, backend);
            for step in 0..3 {
                take_step(&mut rig.swapper, step);
            }
            assert!(rig.state() == reference(3), "depth {depth}, {kept} tenths in memory");
        }
    }
}

#[test]
fn bytes_moved_are_in_proportion_to_what_does_not_stay() {
    let per_step = |kept| {
        let mut rig = Rig::new(&options(kept, 2), Durability::None);
        take_step(&mut rig.swapper, 0);
        rig.swapper.settle().unwrap();
        let before = rig.bytes_moved();
        take_step(&mut rig.swapper, 1);
        rig.swapper.settle().unwrap();
        let after = rig.bytes_moved();
        let share = 1.0 - rig.swapper.plan().kept_bytes() as f64 / rig.swapper.plan().state_bytes() as f64;
        (share, (after.0 - before.0) as f64, (after.1 - before.1) as f64)
    };
    let (share, read, written) = per_step(0);
    assert_eq!(share, 1.0);
    for kept in [3, 5, 8] {
        let (share, some_read, some_written) = per_step(kept);
        assert!((0.01..0.99).contains(&share));
        // Tiles are not all of one length, and their gradients less so.
        assert!((some_read / read - share).abs() < 0.1, "{share}: {some_read} of {read} read");
        assert!((some_written / written - share).abs() < 0.1, "{share}: {some_written} of {written} written");
    }
    assert_eq!(per_step(10), (0.0, 0.0, 0.0));
}

#[test]
fn what_was_committed_goes_on_with_another_share_in_memory() {
    let mut rig = Rig::new(&options(0, 2), Durability::Step);
    take_step(&mut rig.swapper, 0);
    rig.swapper.commit(&json!({ "step": 1 })).unwrap();
    for (step, kept) in [(1, 5), (2, 10), (3, 0)] {
        rig = rig.reopen(&options(kept, 1));
        assert_eq!(rig.swapper.meta(), json!({ "step": step }));
        take_step(&mut rig.swapper, step);
        rig.swapper.commit(&json!({ "step": step + 1 })).unwrap();
        // Of this nothing is found again.
        take_step(&mut rig.swapper, 77);
    }
    let mut rig = rig.reopen(&options(3, 2));
    assert!(rig.state() == reference(4));
}

#[test]
fn the_step_that_an_optimizers_user_commits_is_seen_from_outside() {
    let mut rig = Rig::new(&options(0, 2), Durability::Step);
    take_step(&mut rig.swapper, 0);
    for (meta, step) in [(json!({ "step": 7 }), Some(7)), (json!({ "step": "7" }), None), (json!(null), None)]
    {
        rig.swapper.commit(&meta).unwrap();
        assert_eq!(Store::committed(&path(&rig.folder)).unwrap().step(), step);
    }
}

#[test]
fn a_step_that_does_not_count_is_rolled_back_and_one_that_failed_too() {
    for kept in [0, 5, 10] {
        let mut rig = Rig::new(&options(kept, 2), Durability::Step);
        take_step(&mut rig.swapper, 0);
        rig.swapper.commit(&json!(null)).unwrap();

        take_step(&mut rig.swapper, 5);
        rig.swapper.roll_back().unwrap();
        assert!(rig.state() == reference(1));

        put_gradients(&mut rig.swapper, 6);
        let mut seen = 0;
        let refused = rig.swapper.step(
            |_| true,
            |part| {
                seen += 1;
                if seen == 9 { Err("no".to_owned()) } else { mix(part) }
            },
        );
        assert!(matches!(refused, Err(PassError::Compute(reason)) if reason == "no"));
        assert!(matches!(rig.swapper.commit(&json!(null)), Err(OptimizerError::Lost)));
        let lost = rig.swapper.step(|_| true, mix);
        assert!(matches!(lost, Err(PassError::Swapper(OptimizerError::Lost))));
        rig.swapper.roll_back().unwrap();
        take_step(&mut rig.swapper, 1);
        assert!(rig.state() == reference(2));
    }
}

#[test]
fn parameters_without_a_gradient_keep_their_state_and_cost_nothing() {
    let mut rig = Rig::new(&options(0, 2), Durability::None);
    take_step(&mut rig.swapper, 0);
    rig.swapper.settle().unwrap();
    let (before, moved_before) = (rig.state(), rig.bytes_moved());
    put_gradients(&mut rig.swapper, 1);
    rig.swapper.flush_gradients().unwrap();
    let gradients_written = rig.bytes_moved();
    rig.swapper.prefetch().unwrap();
    rig.swapper.step(|parameter| parameter == 3, mix).unwrap();
    rig.swapper.settle().unwrap();
    let moved = rig.bytes_moved();
    let after = rig.state();
    for (parameter, (before, after)) in before.iter().zip(&after).enumerate() {
        assert_eq!(before != after, parameter == 3);
    }
    assert!(gradients_written.1 > moved_before.1);
    // Its own tiles, at most one neighbor on either side, and what was prefetched.
    let most = (40_000 * (STATE_BYTES + GRADIENT_BYTES) + 8 * TILE_BYTES) as u64;
    assert!(moved.0 - moved_before.0 < most && moved.1 - gradients_written.1 < most);
}

#[test]
fn before_a_pass_the_pipelines_blocks_are_loaded_into_and_those_of_gradients_are_not() {
    let spec = |i: usize| ParameterSpec {
        name: format!("p{i}"),
        numel: TILE_BYTES / GRADIENT_BYTES,
        state: StateSize::per_element(GRADIENT_BYTES),
        begins_tile: true,
    };
    let specs: Vec<_> = (0..20).map(spec).collect();
    for depth in 0..4 {
        let options = PlanOptions { kept_bytes_max: Some(0), ..options(0, depth) };
        let plan = OptimizerPlan::new(&specs, &options).unwrap();
        let own = items_in_memory(depth);
        // A gradient's tile is as long as its state's, so both are of one class.
        let classes = plan.classes();
        assert!(matches!(&classes[..], [class] if class.count == 2 * own), "{classes:?}");
        let pool = Pool::new(&classes).unwrap();
        let engine = Engine::start(EngineConfig::default(), &pool).unwrap();
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let bytes = plan.storage_bytes(Durability::None);
        let store = Store::create(&path(&folder), Durability::None, bytes, &engine).unwrap();
        let mut swapper = OptimizerSwapper::create(&specs, plan, &store, &pool).unwrap();
        let fill = |part: PartView<'_>| {
            part.state.fill(7);
            Ok::<_, String>(())
        };
        swapper.edit(|_| true, fill).unwrap();
        // Writes that are under way hold blocks, too.
        swapper.prefetch().unwrap();
        assert!(pool.leased_blocks() <= own);
        swapper.settle().unwrap();
        swapper.prefetch().unwrap();
        swapper.prefetch().unwrap();
        assert_eq!(pool.leased_blocks(), own);
        let mut seen = 0;
        let look = |_, _, state: &[u8]| {
            seen += state.iter().filter(|byte| **byte == 7).count();
            Ok::<_, String>(())
        };
        swapper.read(|_| true, look).unwrap();
        assert_eq!(seen, 20 * TILE_BYTES);
    }
}

#[test]
fn purged_state_is_new_again_and_stays_so_over_a_commit() {
    let mut rig = Rig::new(&options(3, 1), Durability::Step);
    take_step(&mut rig.swapper, 0);
    rig.swapper.purge(0).unwrap();
    rig.swapper.purge(2).unwrap();
    rig.swapper.commit(&json!(null)).unwrap();
    let mut rig = rig.reopen(&options(0, 1));
    let state = rig.state();
    assert!(state[0].is_empty() && state[2].is_empty() && state[1] == reference(1)[1]);
    let mut fresh = Vec::new();
    let edited = rig.swapper.edit(
        |_| true,
        |part| {
            assert!(!part.is_new || part.state.iter().all(|&byte| byte == 0));
            if part.is_new {
                fresh.push(part.parameter);
                part.state.fill(part.parameter as u8 + 1);
            }
            assert!(part.gradient.is_none());
            Ok::<(), String>(())
        },
    );
    edited.unwrap();
    fresh.dedup();
    assert_eq!(fresh, [0, 2]);
    let state = rig.state();
    assert!(state[0].iter().all(|&byte| byte == 1) && state[2].iter().all(|&byte| byte == 3));
    assert!(matches!(rig.swapper.purge(99), Err(OptimizerError::NoParameter { parameter: 99, count: 8 })));
}

#[test]
fn gradients_come_in_any_pieces_and_what_is_missing_is_zero() {
    let mut rig = Rig::new(&options(0, 1), Durability::None);
    rig.swapper.swap_out_gradient(0, 10, &gradient(0, 0, 10..20)).unwrap();
    rig.swapper.swap_out_gradient(0, 15, &gradient(0, 1, 15..17)).unwrap();
    assert!(rig.swapper.gradient_memory_bytes() > 0);
    let mut seen = Vec::new();
    let step = rig.swapper.step(
        |parameter| parameter == 0,
        |part| {
            seen.extend_from_slice(part.gradient.unwrap_or(&[]));
            Ok::<(), String>(())
        },
    );
    step.unwrap();
    let mut expected = vec![0; seen.len()];
    expected[10 * 4..20 * 4].copy_from_slice(&gradient(0, 0, 10..20));
    expected[15 * 4..17 * 4].copy_from_slice(&gradient(0, 1, 15..17));
    assert!(!seen.is_empty() && seen == expected);
    assert_eq!(rig.swapper.gradient_memory_bytes(), 0);

    for (offset, bytes) in [(70_001, 4), (70_000, 8), (usize::MAX, 4), (0, 3)] {
        let refused = rig.swapper.swap_out_gradient(0, offset, &vec![0; bytes]);
        assert!(matches!(refused, Err(OptimizerError::GradientRange { .. })), "{offset} {bytes}");
    }
}

#[test]
fn another_models_state_is_refused() {
    let mut rig = Rig::new(&options(0, 1), Durability::Step);
    take_step(&mut rig.swapper, 0);
    rig.swapper.commit(&json!(null)).unwrap();
    let Rig { swapper, engine, folder } = rig;
    drop((swapper, engine));
    let (_, pool, engine) = start(&options(0, 1));
    let store = Store::open(&path(&folder), Durability::Step, &engine).unwrap();
    assert_eq!(OptimizerSwapper::tile_bytes(&store.meta()), Some(TILE_BYTES));
    let mut others = specs();
    others[1].numel += 1;
    let plan = OptimizerPlan::new(&others, &options(0, 1)).unwrap();
    let refused = OptimizerSwapper::open(&others, plan, &store, &pool);
    assert!(matches!(refused, Err(OptimizerError::OtherParameters { .. })));
}

#[test]
fn a_damaged_tile_is_named_and_leaves_every_block_in_the_pool() {
    let options = options(0, 2);
    let mut rig = Rig::new(&options, Durability::Step);
    take_step(&mut rig.swapper, 0);
    rig.swapper.commit(&json!(null)).unwrap();
    flip_every_bit(&path(&rig.folder).join("data"));
    let lost = rig.swapper.step(|_| true, |_| Ok::<(), String>(()));
    match lost {
        Err(PassError::Swapper(OptimizerError::Store(StoreError::Corrupt { tensor, .. }))) => {
            assert!(tensor.starts_with("state/") || tensor.starts_with("gradient/"), "{tensor}");
        }
        other => panic!("{other:?}"),
    }
}

fn flip_every_bit(file: &Path) {
    let bytes: Vec<u8> = std::fs::read(file).unwrap().iter().map(|byte| !byte).collect();
    std::fs::write(file, bytes).unwrap();
}

#[test]
fn small_state_is_not_worth_moving_on_its_own() {
    assert!(!is_swappable((1 << 20) - 1, 4096));
    assert!(is_swappable(1 << 20, 1 << 20));
    assert!(!is_swappable(1 << 20, 2 << 20));
}

#[test]
fn parameters_that_are_added_later_leave_the_state_of_the_others_as_it_is() {
    for kept_of_ten in [0, 5, 10] {
        let options = options(kept_of_ten, 2);
        let mut rig = Rig::new(&options, Durability::Step);
        take_step(&mut rig.swapper, 1);
        let before = rig.state();

        let mut more = specs();
        for (index, numel) in [30_000, 3].into_iter().enumerate() {
            let state = StateSize::per_element(STATE_BYTES);
            more.push(ParameterSpec { name: format!("more{index}"), numel, state, begins_tile: index == 0 });
        }
        let plan = |options: &PlanOptions| OptimizerPlan::new(&more, options).unwrap();
        let larger = PlanOptions { memory_bytes: options.memory_bytes + (1 << 20), ..options };
        let Rig { swapper, engine, folder } = rig;
        let mut swapper = swapper.extend(&more, plan(&larger)).unwrap();
        let mut after = vec![Vec::new(); more.len()];
        let mut collect = |swapper: &mut OptimizerSwapper| {
            after.iter_mut().for_each(Vec::clear);
            let look = |parameter: usize, _: Range<usize>, bytes: &[u8]| {
                after[parameter].extend_from_slice(bytes);
                Ok::<(), String>(())
            };
            swapper.read(|_| true, look).unwrap();
            after.clone()
        };
        let found = collect(&mut swapper);
        assert_eq!(found[..before.len()], before, "kept {kept_of_ten}/10");
        assert!(found[before.len()..].iter().all(Vec::is_empty), "nobody has given the new ones any state");

        let fill = |part: PartView<'_>| {
            assert!(part.is_new);
            part.state.fill(9);
            Ok::<(), String>(())
        };
        swapper.edit(|parameter| parameter >= before.len(), fill).unwrap();
        swapper.commit(&json!(null)).unwrap();
        let committed = collect(&mut swapper);
        drop((swapper, engine));

        let pool = Pool::new(&plan(&larger).classes()).unwrap();
        let engine = Engine::start(EngineConfig::default(), &pool).unwrap();
        let store = Store::open(&path(&folder), Durability::Step, &engine).unwrap();
        let mut swapper = OptimizerSwapper::open(&more, plan(&larger), &store, &pool).unwrap();
        assert_eq!(collect(&mut swapper), committed);
    }
}

#[test]
fn an_extension_of_other_parameters_is_refused() {
    let options = options(0, 1);
    let rig = Rig::new(&options, Durability::None);
    let mut others = specs();
    others[1].numel += 1;
    let plan = OptimizerPlan::new(&others, &options).unwrap();
    let refused = rig.swapper.extend(&others, plan);
    assert!(matches!(refused, Err(OptimizerError::OtherParameters { .. })), "{refused:?}");
}
