//! Optimizer state on a storage that fails, with gradients that are missing, odd or many, and plans that nobody should ask
//! for.

use std::ops::Range;
use std::time::Duration;

use overspill_io::{BackendChoice, Engine, EngineConfig, Pool, SimConfig};
use overspill_swap::optimizer::{
    OptimizerError, OptimizerPlan, OptimizerSwapper, ParameterSpec, PartView, PassError, PlanOptions,
    StateSize,
};
use overspill_swap::{Durability, Store};
use serde_json::json;
use tempfile::TempDir;

const GRADIENT_BYTES: usize = 4;

fn spec(name: &str, numel: usize, state_bytes: usize) -> ParameterSpec {
    ParameterSpec {
        name: name.to_owned(),
        numel,
        state: StateSize::per_element(state_bytes),
        begins_tile: false,
    }
}

/// A plan that keeps nothing.
fn moving(depth: usize, tile_bytes: usize) -> PlanOptions {
    PlanOptions {
        memory_bytes: 64 << 20,
        kept_bytes_max: Some(0),
        depth: Some(depth),
        tile_bytes: Some(tile_bytes),
        gradient_bytes: Some(GRADIENT_BYTES),
    }
}

/// Fields are dropped from top to bottom.
struct Rig {
    swapper: OptimizerSwapper,
    _engine: Engine,
    pool: Pool,
    _folder: TempDir,
}

impl Rig {
    fn new(specs: &[ParameterSpec], options: &PlanOptions, backend: BackendChoice) -> Self {
        let plan = OptimizerPlan::new(specs, options).unwrap();
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        // Who waits for a block that nobody gives back shall not wait for long.
        let pool = Pool::with_patience(&plan.classes(), Duration::from_secs(5)).unwrap();
        let engine = Engine::start(EngineConfig { backend, ..EngineConfig::default() }, &pool).unwrap();
        let path = folder.path().join("store");
        let store =
            Store::create(&path, Durability::Step, plan.storage_bytes(Durability::Step), &engine).unwrap();
        let swapper = OptimizerSwapper::create(specs, plan, &store, &pool).unwrap();
        Self { swapper, _engine: engine, pool, _folder: folder }
    }

    fn calm(specs: &[ParameterSpec], options: &PlanOptions) -> Self {
        Self::new(specs, options, BackendChoice::Auto)
    }
}

fn words(range: Range<usize>, salt: u32) -> Vec<u8> {
    range.flat_map(|element| (element as u32 ^ salt).to_le_bytes()).collect()
}

/// What a step sees of each parameter: its gradient, or that it has none.
fn seen(rig: &mut Rig, wants: impl Fn(usize) -> bool, count: usize) -> Vec<Option<Vec<u8>>> {
    let mut seen: Vec<Option<Option<Vec<u8>>>> = vec![None; count];
    let step = rig.swapper.step(wants, |part: PartView<'_>| {
        match (&mut seen[part.parameter], part.gradient) {
            (first @ None, gradient) => *first = Some(gradient.map(<[u8]>::to_vec)),
            (Some(Some(bytes)), Some(more)) => bytes.extend_from_slice(more),
            (Some(None), None) => {}
            (Some(_), other) => panic!("{}: {:?} {other:?}", part.parameter, part.elements),
        }
        Ok::<(), String>(())
    });
    step.unwrap();
    seen.into_iter().map(Option::flatten).collect()
}

#[test]
fn whether_a_parameter_has_a_gradient_does_not_depend_on_who_shares_its_tiles() {
    let specs = [spec("a", 3000, 8), spec("b", 100, 8), spec("c", 5000, 8), spec("d", 10, 8)];
    for tile_bytes in [4096, 16 << 10, 1 << 20] {
        let mut rig = Rig::calm(&specs, &moving(1, tile_bytes));
        // A piece in the middle of `a`, all of `d`, nothing of the others.
        rig.swapper.swap_out_gradient(0, 1500, &words(1500..1510, 0)).unwrap();
        rig.swapper.swap_out_gradient(3, 0, &words(0..10, 7)).unwrap();
        rig.swapper.swap_out_gradient(1, 5, &[]).unwrap();
        let mut expected = vec![0; 3000 * GRADIENT_BYTES];
        expected[1500 * GRADIENT_BYTES..1510 * GRADIENT_BYTES].copy_from_slice(&words(1500..1510, 0));
        let found = seen(&mut rig, |_| true, 4);
        assert!(found[0].as_deref() == Some(&expected[..]), "tiles of {tile_bytes}");
        assert_eq!((&found[1], &found[2]), (&None, &None), "tiles of {tile_bytes}");
        assert_eq!(found[3], Some(words(0..10, 7)), "tiles of {tile_bytes}");
    }
}

#[test]
fn a_step_leaves_no_gradient_behind_whoever_it_was_for() {
    let specs = [spec("a", 1000, 8), spec("b", 5000, 8)];
    for tile_bytes in [4096, 16 << 10] {
        let mut rig = Rig::calm(&specs, &moving(1, tile_bytes));
        rig.swapper.swap_out_gradient(0, 0, &words(0..1000, 1)).unwrap();
        rig.swapper.swap_out_gradient(1, 0, &words(0..5000, 2)).unwrap();
        assert!(seen(&mut rig, |parameter| parameter == 0, 2)[0].is_some());
        assert_eq!(seen(&mut rig, |_| true, 2), [None, None], "tiles of {tile_bytes}");
        assert_eq!(rig.swapper.gradient_memory_bytes(), 0);
    }
}

#[test]
fn a_gradient_that_cannot_be_written_comes_home_and_stops_nobody_for_long() {
    let specs = [spec("a", 40_000, 8)];
    let mut failed = 0;
    for (seed, depth) in (0..12).zip([0, 1, 2].into_iter().cycle()) {
        let sim = SimConfig { write_error_per_mille: 300, ..SimConfig::calm(seed) };
        let mut rig = Rig::new(&specs, &moving(depth, 32 << 10), BackendChoice::Sim(sim));
        let mut insist = |what: &str, action: &mut dyn FnMut() -> Result<(), OptimizerError>| {
            for _ in 0..100 {
                match action() {
                    Ok(()) => return,
                    Err(OptimizerError::Store(error)) => {
                        failed += 1;
                        assert!(error.to_string().contains("gradient/"), "{what}: {error}");
                    }
                    Err(error) => panic!("{what}: {error}"),
                }
            }
            panic!("{what} never succeeds");
        };
        for round in 0..3 {
            let bytes = words(0..40_000, round);
            let mut put = |range: Range<usize>| {
                let piece = &bytes[range.start * GRADIENT_BYTES..range.end * GRADIENT_BYTES];
                insist("put", &mut || rig.swapper.swap_out_gradient(0, range.start, piece));
            };
            put(0..40_000);
            put(100..9000);
        }
        insist("flush", &mut || rig.swapper.flush_gradients());
        let found = std::cell::RefCell::new(Vec::new());
        // Only what was written fails here, and it is not written again: the state is, but that nobody waits for.
        let step = rig.swapper.step(
            |_| true,
            |part| {
                found.borrow_mut().extend_from_slice(part.gradient.expect("it was put"));
                Ok::<(), String>(())
            },
        );
        if step.is_ok() {
            assert!(found.into_inner() == words(0..40_000, 2), "seed {seed}");
        }
        drop(rig.swapper);
        assert_eq!(rig.pool.leased_blocks(), 0);
    }
    assert!(failed > 10, "{failed}");
}

#[test]
fn a_step_whose_gradients_were_not_written_changes_nothing() {
    let sim = SimConfig { write_error_per_mille: 1000, ..SimConfig::calm(1) };
    let mut rig = Rig::new(&[spec("a", 8000, 8)], &moving(1, 32 << 10), BackendChoice::Sim(sim));
    rig.swapper.swap_out_gradient(0, 0, &words(0..8000, 4)).unwrap();
    let refused = rig.swapper.step(|_| true, |_| Ok::<(), String>(()));
    assert!(matches!(refused, Err(PassError::Swapper(OptimizerError::Store(_)))));
    // The gradients are at home now, and the state was never touched.
    assert_eq!(rig.swapper.gradient_memory_bytes(), 8000 * GRADIENT_BYTES);
    rig.swapper.edit(|_| false, |_| Ok::<(), String>(())).unwrap();
}

#[test]
fn gradients_in_pieces_of_any_order_take_no_more_memory_than_planned() {
    let specs = [spec("a", 100_000, 8), spec("frozen", 1000, 8), spec("b", 100_000, 8)];
    let options = moving(1, 32 << 10);
    let mut rig = Rig::calm(&specs, &options);
    let plan = rig.swapper.plan();
    let blocks: usize = plan.classes().iter().map(|class| class.block_bytes * class.count).sum();
    let beside_blocks = plan.total_bytes() - blocks;
    for parameter in [0, 2] {
        // Every 7th piece, seven times over: no tile is whole before the last round.
        for first in 0..7 {
            for piece in (first..1000).step_by(7) {
                let range = piece * 100..(piece + 1) * 100;
                rig.swapper.swap_out_gradient(parameter, range.start, &words(range, 3)).unwrap();
                assert!(rig.swapper.gradient_memory_bytes() <= beside_blocks);
            }
        }
    }
    let found = seen(&mut rig, |_| true, 3);
    for parameter in [0, 2] {
        assert!(found[parameter].as_deref() == Some(&words(0..100_000, 3)[..]));
    }
    assert_eq!(found[1], None);
}

#[test]
fn who_only_looks_and_stops_looking_loses_nothing() {
    let specs = [spec("a", 40_000, 8)];
    for kept_bytes_max in [Some(0), None] {
        let mut rig = Rig::calm(&specs, &PlanOptions { kept_bytes_max, ..moving(2, 32 << 10) });
        let fill = |part: PartView<'_>| -> Result<(), String> {
            part.state.fill(part.elements.start as u8 | 1);
            Ok(())
        };
        rig.swapper.edit(|_| true, fill).unwrap();
        let mut looks = 0;
        let refused = rig.swapper.read(
            |_| true,
            |_, _, _| {
                looks += 1;
                if looks == 3 { Err("the disk of the copy is full") } else { Ok(()) }
            },
        );
        assert!(matches!(refused, Err(PassError::Compute(_))) && looks == 3);
        let mut read = 0;
        let again = rig.swapper.read(
            |_| true,
            |_, elements, state| {
                assert!(state.iter().all(|&byte| byte == elements.start as u8 | 1));
                read += elements.len();
                Ok::<(), String>(())
            },
        );
        again.unwrap();
        assert_eq!(read, 40_000);
        rig.swapper.commit(&json!(null)).unwrap();
    }
}

#[test]
fn what_stays_in_memory_survives_a_commit_that_fails() {
    let specs = [spec("a", 40_000, 8)];
    let options = PlanOptions { kept_bytes_max: None, ..moving(1, 32 << 10) };
    let mut failed = 0;
    for seed in 0..8 {
        let sim = SimConfig { write_error_per_mille: 100, ..SimConfig::calm(seed) };
        let mut rig = Rig::new(&specs, &options, BackendChoice::Sim(sim));
        let fill = |part: PartView<'_>| -> Result<(), String> {
            part.state.fill(9);
            Ok(())
        };
        rig.swapper.edit(|_| true, fill).unwrap();
        while let Err(error) = rig.swapper.commit(&json!(null)) {
            assert!(matches!(error, OptimizerError::Store(_)), "{error}");
            failed += 1;
            assert!(failed < 1000);
        }
        let all = rig.swapper.read(
            |_| true,
            |_, _, state| if state.iter().all(|&byte| byte == 9) { Ok(()) } else { Err("lost") },
        );
        all.unwrap();
    }
    assert!(failed > 3, "{failed}");
}

#[test]
fn parameters_without_state_are_no_trouble() {
    let specs = [spec("a", 40_000, 0), spec("b", 7, 0)];
    let mut rig = Rig::calm(&specs, &moving(1, 32 << 10));
    rig.swapper.swap_out_gradient(0, 0, &words(0..40_000, 5)).unwrap();
    let found = seen(&mut rig, |_| true, 2);
    assert!(found[0].as_deref() == Some(&words(0..40_000, 5)[..]) && found[1].is_none());
    rig.swapper.commit(&json!(null)).unwrap();
}

#[test]
fn gradients_of_no_bytes_are_not_swapped() {
    let options = PlanOptions { gradient_bytes: Some(0), ..moving(1, 32 << 10) };
    let mut rig = Rig::calm(&[spec("a", 100, 8)], &options);
    let refused = rig.swapper.swap_out_gradient(0, 0, &[1]);
    assert!(matches!(refused, Err(OptimizerError::GradientsStay)));
    assert_eq!(seen(&mut rig, |_| true, 1), [None]);
}

#[test]
fn plans_that_nobody_can_pay_for_are_refused() {
    let options = moving(1, 32 << 10);
    let depth = |depth| PlanOptions { depth: Some(depth), ..options };
    let few = [spec("a", 1_000_000, 10)];
    for depth in [depth(usize::MAX), depth(usize::MAX / 2), depth(1 << 40)] {
        OptimizerPlan::new(&few, &depth).unwrap_err();
    }
    let whole = |bytes| {
        [ParameterSpec { name: "w".to_owned(), numel: 3, state: StateSize::Whole(bytes), begins_tile: false }]
    };
    let many = [spec("a", usize::MAX, 10)];
    let two = [spec("a", usize::MAX / 2, 1), spec("b", usize::MAX, 1)];
    for specs in [&whole(usize::MAX)[..], &whole(usize::MAX - 100), &many, &two] {
        for tile_bytes in [Some(1), Some(32 << 10), Some(usize::MAX), None] {
            OptimizerPlan::new(specs, &PlanOptions { tile_bytes, ..options }).unwrap_err();
        }
    }
}

#[test]
fn every_one_of_many_tiny_parameters_gets_its_own_gradient() {
    let specs: Vec<_> = (0..100_000).map(|i| spec(&format!("p{i}"), 1 + i % 3, 8)).collect();
    let mut rig = Rig::calm(&specs, &PlanOptions { memory_bytes: 1 << 30, ..moving(1, 8 << 20) });
    for (parameter, spec) in specs.iter().enumerate() {
        rig.swapper.swap_out_gradient(parameter, 0, &words(0..spec.numel, parameter as u32)).unwrap();
    }
    let found = seen(&mut rig, |_| true, specs.len());
    for (parameter, spec) in specs.iter().enumerate() {
        assert_eq!(found[parameter], Some(words(0..spec.numel, parameter as u32)));
    }
}

/// What the state of every parameter should be: nothing, or its bytes.
type State = Vec<Option<Vec<u8>>>;

const STATE_BYTES: usize = 6;

/// What a step makes of a piece of state.
fn mix(state: &mut [u8], gradient: Option<&[u8]>) {
    for (i, byte) in state.iter_mut().enumerate() {
        let from = gradient.map_or(17, |bytes| bytes[i / STATE_BYTES * GRADIENT_BYTES + i % GRADIENT_BYTES]);
        *byte = byte.wrapping_mul(3).wrapping_add(from).wrapping_add(1);
    }
}

/// The swapper and what should be in it, under random programs.
struct Trial {
    rig: Rig,
    numels: Vec<usize>,
    working: State,
    committed: Option<State>,
    gradients: State,
    failures: usize,
}

impl Trial {
    /// After an error: what is lost is rolled back, and what is not is as it was.
    fn recover(&mut self, what: &dyn std::fmt::Debug) -> bool {
        self.failures += 1;
        // Nobody waited for a block that somebody had forgotten.
        assert!(!format!("{what:?}").contains("Exhausted"), "{what:?}");
        match self.rig.swapper.edit(|_| false, |_| Ok::<(), String>(())) {
            Ok(()) => return true,
            Err(PassError::Swapper(OptimizerError::Lost)) => {}
            Err(error) => panic!("after {what:?}: {error}"),
        }
        let Some(committed) = &self.committed else { return false };
        self.working.clone_from(committed);
        self.gradients.fill(None);
        (0..100).any(|_| self.rig.swapper.roll_back().is_ok())
    }

    fn put(&mut self, parameter: usize, range: Range<usize>, salt: u32) -> bool {
        let piece = words(range.clone(), salt);
        if !(0..100).any(|_| self.rig.swapper.swap_out_gradient(parameter, range.start, &piece).is_ok()) {
            return false;
        }
        let whole = vec![0; self.numels[parameter] * GRADIENT_BYTES];
        let gradient = self.gradients[parameter].get_or_insert(whole);
        gradient[range.start * GRADIENT_BYTES..range.end * GRADIENT_BYTES].copy_from_slice(&piece);
        true
    }

    fn step(&mut self, wanted: u64) -> bool {
        let wants = |parameter: usize| wanted >> parameter & 1 == 1;
        let step = self.rig.swapper.step(wants, |part| {
            mix(part.state, part.gradient);
            Ok::<(), String>(())
        });
        if let Err(error) = step {
            return self.recover(&error);
        }
        for parameter in (0..self.numels.len()).filter(|&parameter| wants(parameter)) {
            let bytes = self.numels[parameter] * STATE_BYTES;
            let state = self.working[parameter].get_or_insert_with(|| vec![0; bytes]);
            mix(state, self.gradients[parameter].as_deref());
        }
        self.gradients.fill(None);
        true
    }

    fn check(&mut self) -> bool {
        let mut found: State = vec![None; self.numels.len()];
        let read = self.rig.swapper.read(
            |_| true,
            |parameter, _, bytes| {
                found[parameter].get_or_insert_default().extend_from_slice(bytes);
                Ok::<(), String>(())
            },
        );
        if let Err(error) = read {
            return self.recover(&error);
        }
        assert!(found == self.working);
        true
    }

    fn commit(&mut self) -> bool {
        if let Err(error) = self.rig.swapper.commit(&json!(null)) {
            return self.recover(&error);
        }
        self.committed = Some(self.working.clone());
        true
    }

    /// Runs a program; `false` when nothing could be saved.
    fn run(&mut self, random: &mut impl FnMut(usize) -> usize) -> bool {
        (0..60).all(|_| match random(12) {
            0..=3 => {
                let parameter = random(self.numels.len());
                let start = random(self.numels[parameter]);
                let end = start + 1 + random(self.numels[parameter] - start);
                self.put(parameter, start..end, random(1 << 30) as u32)
            }
            4 => {
                let parameter = random(self.numels.len());
                self.put(parameter, 0..self.numels[parameter], random(1 << 30) as u32)
            }
            5 => self.rig.swapper.prefetch().map_or_else(|error| self.recover(&error), |()| true),
            6 => self.rig.swapper.flush_gradients().map_or_else(|error| self.recover(&error), |()| true),
            7 => {
                let parameter = random(self.numels.len());
                self.rig.swapper.purge(parameter).unwrap();
                self.working[parameter] = None;
                true
            }
            8 => self.commit(),
            9 => self.check(),
            _ => self.step(random(1 << 8) as u64),
        })
    }
}

#[test]
fn random_programs_on_a_failing_storage_lose_nothing_but_what_they_are_told_of() {
    let numels = vec![9000, 10, 300, 12_000, 1, 700, 4096, 5];
    let specs: Vec<_> =
        numels.iter().enumerate().map(|(i, &n)| spec(&format!("p{i}"), n, STATE_BYTES)).collect();
    let (mut failures, mut whole) = (0, 0);
    for seed in 0..30 {
        let mut state = seed * 2 + 1;
        let mut random = move |below: usize| {
            state = u64::wrapping_mul(state, 0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 33) as usize % below
        };
        let kept_bytes_max = [Some(0), Some(60 << 10), None][random(3)];
        let options = PlanOptions { kept_bytes_max, ..moving(random(4), [4096, 16 << 10][random(2)]) };
        let storm = SimConfig { short_per_mille: 20, ..SimConfig::stormy(seed) };
        let sim = if seed % 3 == 0 { SimConfig::calm(seed) } else { storm };
        let rig = Rig::new(&specs, &options, BackendChoice::Sim(sim));
        let nothing: State = vec![None; numels.len()];
        let (working, gradients) = (nothing.clone(), nothing);
        let mut trial =
            Trial { rig, numels: numels.clone(), working, committed: None, gradients, failures: 0 };
        whole += usize::from(trial.run(&mut random));
        failures += trial.failures;
        let Trial { rig: Rig { mut swapper, pool, .. }, .. } = trial;
        // What is under way has its block until it has ended, however it ends.
        drop(swapper.settle());
        drop(swapper);
        assert_eq!(pool.leased_blocks(), 0, "seed {seed}");
    }
    assert!(failures > 10 && whole >= 10, "{failures} failures, {whole} programs to their end");
}
