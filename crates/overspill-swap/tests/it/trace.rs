//! What a subscriber sees of an optimizer step, and what the hooks around backward do.

use std::sync::{Arc, Mutex};

use overspill_io::{Engine, EngineConfig, Pool};
use overspill_swap::optimizer::{
    OptimizerPlan, OptimizerSwapper, ParameterSpec, PartView, PlanOptions, StateSize,
};
use overspill_swap::{Durability, Store};
use tempfile::TempDir;
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::with_default;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::apart::alone;

const NUMEL: usize = 4096;

/// Fields are dropped from top to bottom.
struct Rig {
    swapper: OptimizerSwapper,
    engine: Engine,
    _folder: TempDir,
}

impl Rig {
    /// State of two tiles, none of which stays in memory.
    fn new(depth: usize) -> Self {
        let spec = |name: &str| ParameterSpec {
            name: name.to_owned(),
            numel: NUMEL,
            state: StateSize::per_element(8),
            begins_tile: false,
        };
        let specs = [spec("a"), spec("b")];
        let options = PlanOptions {
            memory_bytes: usize::MAX,
            kept_bytes_max: Some(0),
            depth: Some(depth),
            tile_bytes: Some(32 << 10),
            gradient_bytes: Some(4),
        };
        let plan = OptimizerPlan::new(&specs, &options).unwrap();
        let pool = Pool::new(&plan.classes()).unwrap();
        let engine = Engine::start(EngineConfig::default(), &pool).unwrap();
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let durability = Durability::None;
        let bytes = plan.storage_bytes(durability);
        let store = Store::create(&folder.path().join("store"), durability, bytes, &engine).unwrap();
        let mut swapper = OptimizerSwapper::create(&specs, plan, &store, &pool).unwrap();
        swapper.edit(|_| true, fill).unwrap();
        Self { swapper, engine, _folder: folder }
    }

    fn backward(&mut self) {
        self.swapper.pre_backward().unwrap();
        for parameter in 0..2 {
            self.swapper.swap_out_gradient(parameter, 0, &[7; 4 * NUMEL]).unwrap();
        }
        self.swapper.post_backward().unwrap();
    }
}

#[expect(clippy::needless_pass_by_value, reason = "a step's computation takes what it is given")]
fn fill(part: PartView<'_>) -> Result<(), String> {
    part.state.fill(part.parameter as u8 + 1);
    Ok(())
}

/// Hears up to a level, and writes down which spans begin within which.
struct Listener {
    level: Level,
    heard: Arc<Mutex<Heard>>,
}

#[derive(Default)]
struct Heard {
    /// Of each span, from 1.
    names: Vec<&'static str>,
    open: usize,
    /// Each span as it begins, indented by the spans that it is in.
    lines: Vec<String>,
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("overspill_swap") && *metadata.level() <= self.level
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut heard = self.heard.lock().unwrap();
        heard.names.push(span.metadata().name());
        Id::from_u64(heard.names.len() as u64)
    }

    fn enter(&self, span: &Id) {
        let mut heard = self.heard.lock().unwrap();
        let line = format!("{}{}", "  ".repeat(heard.open), heard.names[span.into_u64() as usize - 1]);
        heard.lines.push(line);
        heard.open += 1;
    }

    fn exit(&self, _: &Id) {
        self.heard.lock().unwrap().open -= 1;
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
}

fn heard_at(level: Level, act: impl FnOnce()) -> Vec<String> {
    let heard = Arc::<Mutex<Heard>>::default();
    with_default(Listener { level, heard: heard.clone() }, act);
    let heard = heard.lock().unwrap();
    assert_eq!(heard.open, 0, "every span ends");
    heard.lines.clone()
}

#[test]
fn every_phase_of_a_step_is_a_span_in_its_order() {
    // What a thread without a subscriber finds uninteresting is not shown to the others either.
    alone("trace::every_phase_of_a_step_is_a_span_in_its_order_here");
}

#[test]
#[ignore = "run by every_phase_of_a_step_is_a_span_in_its_order"]
fn every_phase_of_a_step_is_a_span_in_its_order_here() {
    let mut rig = Rig::new(0);
    rig.swapper.settle().unwrap();
    let heard = heard_at(Level::DEBUG, || {
        rig.backward();
        rig.swapper.step(|_| true, fill).unwrap();
        rig.swapper.settle().unwrap();
    });
    let expected = "\
pre_backward
  settle
    wait
  prefetch
gradient_swap_out
gradient_swap_out
post_backward
  gradient_flush
    wait
gradient_flush
  wait
pass
  pipeline
    swap_in
      wait
    compute
    swap_out
      wait
    swap_in
      wait
    compute
    swap_out
      wait
settle
  wait";
    assert_eq!(heard.join("\n"), expected);
    // Those of a step that is refused end, too.
    let heard = heard_at(Level::DEBUG, || {
        rig.backward();
        assert!(rig.swapper.step(|_| true, |_| Err("no")).is_err());
    });
    assert_eq!(heard.last().unwrap(), "    compute");
    // Who asks for less sees nothing of it.
    let mut rig = Rig::new(1);
    let heard = heard_at(Level::INFO, || rig.backward());
    assert!(heard.is_empty(), "{heard:?}");
}

#[test]
fn no_write_is_waited_for_when_nothing_is_left_to_load() {
    alone("trace::no_write_is_waited_for_when_nothing_is_left_to_load_here");
}

#[test]
#[ignore = "run by no_write_is_waited_for_when_nothing_is_left_to_load"]
fn no_write_is_waited_for_when_nothing_is_left_to_load_here() {
    let mut rig = Rig::new(1);
    rig.swapper.settle().unwrap();
    let heard = heard_at(Level::DEBUG, || {
        rig.swapper.edit(|_| true, fill).unwrap();
    });
    let expected = "\
pass
  pipeline
    swap_in
      wait
    compute
    swap_out
    swap_in
      wait
    compute
    swap_out";
    assert_eq!(heard.join("\n"), expected);
}

#[test]
fn what_is_waited_for_is_counted_and_is_a_part_of_the_phases() {
    let mut rig = Rig::new(1);
    let before = rig.swapper.phases();
    rig.backward();
    rig.swapper.step(|_| true, fill).unwrap();
    rig.swapper.settle().unwrap();
    let after = rig.swapper.phases();
    assert!(after.wait > before.wait && after.passes == before.passes + 1);
    assert!(after.wait <= after.gradient_swap_out + after.swap_in + after.swap_out);
}

#[test]
fn before_backward_the_first_tiles_are_fetched_once_and_after_it_the_gradients_are_on_storage() {
    let mut rig = Rig::new(0);
    let moved = |rig: &Rig| (rig.engine.stats().bytes_read, rig.engine.stats().bytes_written);
    rig.swapper.settle().unwrap();
    let (read, written) = moved(&rig);
    // A micro-batch after the other: the tile that comes in is not given up for the next one.
    (0..5).for_each(|_| rig.backward());
    let state = [rig.swapper.plan().tile_bytes(), NUMEL * 8];
    let (read_now, written_now) = moved(&rig);
    assert_eq!(written_now - written, 5 * 2 * 4 * NUMEL as u64, "gradients only");
    rig.swapper.step(|_| true, fill).unwrap();
    let read_in_all = moved(&rig).0;
    assert!(read_now - read <= state[0] as u64);
    assert_eq!(read_in_all - read, 2 * (state[1] + 4 * NUMEL) as u64, "each tile and its gradient once");
    assert_eq!(rig.swapper.gradient_memory_bytes(), 0);
}
