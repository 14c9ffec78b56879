//! A loss of power at any moment leaves the last commit whole, and every snapshot.
//!
//! Random programs of operations run on a store whose device, directory included, loses its power at some event: in a
//! write, in a flush, between any two steps of a commit. What had not been flushed is then there, or not, or in part,
//! by the seed. The store is opened from that with a device that works, and held against a model.
//!
//! A seed that fails says in one line how to run it alone: `OVERSPILL_SEED=7 cargo test …`. Programs whose writes go
//! one by one are the same every time; in every fifth, writes are under way together and may meet in another order.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::thread;

use overspill_io::{BackendChoice, Block, BlockClass, Engine, EngineConfig, Pool, Power, SimConfig};
use overspill_swap::{Durability, Links, Store, StoreError, Swapped, Volume, Worth, endanger};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};

/// How many programs there are.
const SEEDS: u64 = 320;
const OPERATIONS: u64 = 60;
const LENGTHS: [usize; 6] = [1, 4096, 5000, 20_000, 64 << 10, 100_000];
const SNAPSHOTS: [&str; 3] = ["a", "b", "c"];

/// In what the power went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Moment {
    Write,
    Commit,
    Snapshot,
    Deletion,
    Growth,
    Restoring,
    /// Nothing was under way.
    Rest,
}

impl Moment {
    const ALL: [Moment; 7] = [
        Moment::Write,
        Moment::Commit,
        Moment::Snapshot,
        Moment::Deletion,
        Moment::Growth,
        Moment::Restoring,
        Moment::Rest,
    ];

    /// Events that it has, or a few more.
    fn events(self) -> u64 {
        match self {
            Moment::Write => 8,
            Moment::Commit | Moment::Restoring => 11,
            Moment::Snapshot | Moment::Deletion => 3,
            Moment::Growth | Moment::Rest => 1,
        }
    }
}

/// What the tensors hold, by their indices, and what was committed with them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct State {
    stamps: BTreeMap<usize, u64>,
    meta: Value,
}

/// What must be found.
#[derive(Debug, Default)]
struct Model {
    working: BTreeMap<usize, u64>,
    committed: Option<State>,
    /// Of a commit, or of a snapshot on its way back, that has begun and is not over.
    next: Option<State>,
    snapshots: BTreeMap<&'static str, State>,
    /// A snapshot that is being made or deleted.
    uncertain: Option<(&'static str, State)>,
    /// Whether the committed state may have been given up for what is overwritten in place.
    may_be_withdrawn: bool,
}

/// A device that keeps its power, for all programs.
struct Sound {
    pool: Pool,
    engine: Engine,
}

/// One program.
struct Program {
    random: ChaCha8Rng,
    durability: Durability,
    /// Writes under way together, at most.
    abreast: u64,
    /// Where the power goes: within the first of these moments from the operation on, after so many events.
    cut: (Option<Moment>, u64, u64),
    pool: Pool,
    engine: Engine,
    power: Power,
    path: PathBuf,
    store: Option<Store>,
    handles: BTreeMap<usize, Swapped>,
    model: Model,
    stamp: u64,
    moment: Moment,
}

#[test]
fn a_loss_of_power_at_any_moment_leaves_the_last_commit_and_every_snapshot() {
    let pool = Pool::new(&[BlockClass { name: "test", block_bytes: 100 << 10, count: 8 }]).unwrap();
    // It reads and writes real files, but no disk is waited for: thousands of flushes would take minutes.
    let backend = BackendChoice::Sim(SimConfig { cache_bytes: 1 << 20, ..SimConfig::calm(0) });
    let engine = Engine::start(EngineConfig { backend, ..EngineConfig::default() }, &pool).unwrap();
    let sound = Sound { pool, engine };
    match std::env::var("OVERSPILL_SEED") {
        Ok(seed) => drop(run(seed.parse().expect("OVERSPILL_SEED is a number"), &sound)),
        Err(_) => {
            let mut seen = BTreeMap::<_, u32>::new();
            (0..SEEDS).for_each(|seed| *seen.entry(run(seed, &sound)).or_default() += 1);
            for moment in Moment::ALL {
                assert!(seen.get(&moment).is_some_and(|&times| times >= 5), "{moment:?} of {seen:?}");
            }
        }
    }
}

/// Says on a panic how to see it again.
struct Reproduce(u64);

impl Drop for Reproduce {
    fn drop(&mut self) {
        if thread::panicking() {
            let seed = self.0;
            eprintln!(
                "to see it again: OVERSPILL_SEED={seed} cargo test --release -p overspill-swap --test it power"
            );
        }
    }
}

/// Runs the program of a seed until the power goes, and checks what is left.
fn run(seed: u64, sound: &Sound) -> Moment {
    let _reproduce = Reproduce(seed);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = folder.path().join("store");
    let mut program = Program::of(seed, &path, &sound.pool);
    let links = if seed % 7 == 6 { Links::One } else { Links::Any };
    let endangered = endanger(&path, links, &program.power);
    program.run();
    let Program { model, moment, durability, store, handles, .. } = program;
    drop((handles, store, endangered));
    let said = format!("seed {seed}, power lost in {moment:?}");
    check(&model, &path, durability, sound, &said);
    moment
}

impl Program {
    fn of(seed: u64, path: &Path, pool: &Pool) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let sim = SimConfig { cache_bytes: 64 << 20, ..SimConfig::calm(seed) };
        let backend = BackendChoice::Sim(sim);
        let config = EngineConfig { backend, chunk_bytes: 32 << 10, ..EngineConfig::default() };
        let engine = Engine::start(config, pool).unwrap();
        let power = engine.power().unwrap();
        let durability = if seed % 8 == 7 { Durability::None } else { Durability::Step };
        let capacity = Store::capacity_for(durability, Worth::State, LENGTHS);
        let store = Store::create(path, durability, capacity, &engine).unwrap();
        store.keep();
        let moment = Moment::ALL[random.next_u64() as usize % Moment::ALL.len()];
        let cut = match seed % 3 {
            0 => (None, 0, random.next_u64() % 300),
            _ => (Some(moment), random.next_u64() % (OPERATIONS / 2), random.next_u64() % moment.events()),
        };
        Self {
            random,
            durability,
            abreast: if seed.is_multiple_of(5) { 3 } else { 1 },
            cut,
            pool: pool.clone(),
            engine,
            power,
            path: path.to_owned(),
            store: Some(store),
            handles: BTreeMap::new(),
            model: Model::default(),
            stamp: 0,
            moment: Moment::Rest,
        }
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.random.next_u64() % bound
    }

    fn store(&self) -> &Store {
        self.store.as_ref().expect("it is open between operations")
    }

    /// Goes on until the power is gone.
    fn run(&mut self) {
        if self.cut.0.is_none() {
            self.power.cut_after(self.cut.2);
        }
        for operation in 0..OPERATIONS {
            let moment = match self.below(20) {
                0..8 => Moment::Write,
                8..12 => Moment::Commit,
                12 | 13 => Moment::Snapshot,
                14 | 15 => Moment::Deletion,
                16 => Moment::Growth,
                17 => Moment::Restoring,
                _ => Moment::Rest,
            };
            if self.cut.0 == Some(moment) && operation >= self.cut.1 {
                self.power.cut_after(self.cut.2);
                self.cut.0 = None;
            }
            self.moment = moment;
            let done = match moment {
                Moment::Write => self.write(),
                Moment::Commit => self.commit(),
                Moment::Snapshot => self.snapshot(),
                Moment::Deletion => self.delete_snapshot(),
                Moment::Growth => self.grow(),
                Moment::Restoring => self.restore(),
                Moment::Rest if self.below(2) == 0 => self.reopen(),
                Moment::Rest => self.roll_back(),
            };
            if self.power.is_out() {
                return;
            }
            done.unwrap_or_else(|error| {
                panic!("operation {operation}, {moment:?}, fails with the power on: {error}")
            });
        }
        self.moment = Moment::Rest;
        self.power.cut();
    }

    /// Writes new contents to some tensors.
    fn write(&mut self) -> Result<(), StoreError> {
        let abreast = 1 + self.below(self.abreast);
        let mut storing = Vec::new();
        for _ in 0..abreast {
            let tensor = self.below(LENGTHS.len() as u64) as usize;
            if storing.iter().any(|&(begun, _, _)| begun == tensor) {
                continue;
            }
            self.stamp += 1;
            let block = filled(&self.pool, tensor, self.stamp);
            let dirty = match self.handles.remove(&tensor) {
                Some(handle) => handle.overwrite(block).unwrap(),
                None => {
                    self.store().reserve(name(tensor), LENGTHS[tensor], Worth::State)?.fill(block).unwrap()
                }
            };
            self.model.may_be_withdrawn |= self.durability == Durability::None;
            storing.push((tensor, self.stamp, dirty.store()));
        }
        let mut failed = None;
        for (tensor, stamp, storing) in storing {
            match storing.wait() {
                Ok(handle) => {
                    self.handles.insert(tensor, handle);
                    self.model.working.insert(tensor, stamp);
                }
                Err(error) => {
                    let data = error.tensor.expect("the memory comes back");
                    assert_eq!(data.bytes(), contents(tensor, stamp), "a failed write hands its data back");
                    failed = Some(error.error);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    fn commit(&mut self) -> Result<(), StoreError> {
        self.stamp += 1;
        let state = State { stamps: self.model.working.clone(), meta: json!(self.stamp) };
        self.model.next = Some(state);
        self.store().commit(json!(self.stamp))?;
        self.model.committed = self.model.next.take();
        self.model.may_be_withdrawn = false;
        Ok(())
    }

    fn roll_back(&mut self) -> Result<(), StoreError> {
        match self.store().roll_back() {
            Err(StoreError::NothingCommitted { .. }) if self.model.may_be_withdrawn => return Ok(()),
            rolled_back => rolled_back?,
        }
        self.model.working =
            self.model.committed.as_ref().map(|state| state.stamps.clone()).unwrap_or_default();
        Ok(())
    }

    fn snapshot(&mut self) -> Result<(), StoreError> {
        let name = SNAPSHOTS[self.below(3) as usize];
        let Some(state) = self.model.committed.clone() else { return Ok(()) };
        if self.model.snapshots.contains_key(name) {
            return Ok(());
        }
        self.model.uncertain = Some((name, state.clone()));
        match self.store().snapshot(name) {
            Err(StoreError::NothingCommitted { .. }) if self.model.may_be_withdrawn => {
                self.model.uncertain = None;
                return Ok(());
            }
            made => made?,
        }
        self.model.uncertain = None;
        self.model.snapshots.insert(name, state);
        Ok(())
    }

    fn delete_snapshot(&mut self) -> Result<(), StoreError> {
        let name = SNAPSHOTS[self.below(3) as usize];
        let Some(state) = self.model.snapshots.remove(name) else { return Ok(()) };
        self.model.uncertain = Some((name, state));
        self.store().delete_snapshot(name)?;
        self.model.uncertain = None;
        Ok(())
    }

    fn grow(&mut self) -> Result<(), StoreError> {
        let present = self.store().usage().capacity_bytes;
        // Sparse or not, a disk need not hold much.
        if present < 192 << 20 { self.store().provide(present + 4096) } else { Ok(()) }
    }

    fn restore(&mut self) -> Result<(), StoreError> {
        let name = SNAPSHOTS[self.below(3) as usize];
        let Some(state) = self.model.snapshots.get(name).cloned() else { return Ok(()) };
        self.handles.clear();
        self.store = None;
        self.model.next = Some(state);
        Store::restore(&self.path, name)?;
        self.model.committed = self.model.next.take();
        self.open()
    }

    fn reopen(&mut self) -> Result<(), StoreError> {
        if self.model.committed.is_none() || self.model.may_be_withdrawn {
            return Ok(());
        }
        self.handles.clear();
        self.store = None;
        self.open()
    }

    fn open(&mut self) -> Result<(), StoreError> {
        let store = Store::open(&self.path, self.durability, &self.engine)?;
        self.model.may_be_withdrawn = false;
        let state = self.model.committed.as_ref().expect("there is something to open");
        self.model.working.clone_from(&state.stamps);
        for &tensor in state.stamps.keys() {
            self.handles.insert(tensor, store.adopt(&name(tensor), LENGTHS[tensor])?);
        }
        self.store = Some(store);
        Ok(())
    }
}

#[test]
fn a_commit_makes_the_data_of_every_volume_last() {
    const BYTES: usize = 3 << 20;
    for seed in 0..8 {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let pool = Pool::new(&[BlockClass { name: "test", block_bytes: BYTES, count: 2 }]).unwrap();
        let volumes: Vec<Volume> = (0..3)
            .map(|volume| {
                let sim = SimConfig { cache_bytes: 64 << 20, ..SimConfig::calm(8 * seed + volume) };
                let config = EngineConfig { backend: BackendChoice::Sim(sim), ..EngineConfig::default() };
                let engines = vec![Engine::start(config, &pool).unwrap()];
                Volume { directory: folder.path().join(format!("volume {volume}")), engines, weight: 1 }
            })
            .collect();
        let capacity = Store::capacity_for(Durability::Step, Worth::State, [BYTES]);
        let store = Store::create_over(&volumes, Durability::Step, capacity).unwrap();
        store.keep();
        let mut block = pool.lease(BYTES).unwrap();
        block.fill(1);
        let tensor = store.reserve("a", BYTES, Worth::State).unwrap().fill(block).unwrap();
        let tensor = tensor.store().wait().unwrap();
        store.commit(json!(1)).unwrap();
        let mut block = pool.lease(BYTES).unwrap();
        block.fill(2);
        let tensor = tensor.overwrite(block).unwrap().store().wait().unwrap();
        volumes.iter().for_each(|volume| volume.engines[0].power().unwrap().cut());
        drop((tensor, store));

        let config = EngineConfig { backend: BackendChoice::Threads, ..EngineConfig::default() };
        let engine = Engine::start(config, &pool).unwrap();
        let sound = volumes.into_iter().map(|volume| Volume { engines: vec![engine.clone()], ..volume });
        let store = Store::open_over(&sound.collect::<Vec<_>>(), Durability::Step).unwrap();
        let tensor = store.adopt("a", BYTES).unwrap();
        let resident = tensor.load(pool.lease(BYTES).unwrap()).unwrap().wait().unwrap();
        assert!(resident.bytes().iter().all(|&byte| byte == 1), "seed {seed}");
    }
}

/// Opens what is left, with a device that works, and holds it against the model.
fn check(model: &Model, path: &Path, durability: Durability, sound: &Sound, said: &str) {
    let _no_flush = endanger(path, Links::Any, &sound.engine.power().unwrap());
    let open = || Store::open(path, durability, &sound.engine);
    match open() {
        Ok(store) => {
            let found = Found::in_store(&store, sound, said);
            let known = || [&model.committed, &model.next].into_iter().flatten();
            let Found { meta, .. } = &found;
            assert!(
                known().any(|state| Found::of(state) == found),
                "{said}: found {meta}, not one of {:?}",
                [&model.committed, &model.next]
            );
            // Whoever goes on from it takes nothing from the snapshots.
            for &tensor in found.bytes.keys() {
                let handle = store.adopt(&name(tensor), LENGTHS[tensor]).unwrap();
                let dirty = handle.overwrite(filled(&sound.pool, tensor, 0)).unwrap();
                drop(dirty.store().wait().unwrap());
            }
            store.commit(json!("more")).unwrap();
        }
        Err(StoreError::NothingCommitted { .. } | StoreError::ManifestLost { .. }) => {
            assert!(model.committed.is_none() || model.may_be_withdrawn, "{said}: nothing is committed");
        }
        Err(error) => panic!("{said}: {error}"),
    }
    let mut snapshots = model.snapshots.clone();
    let is_there = |name: &str| path.join(format!("snapshot.{name}")).exists();
    if let Some((name, state)) = &model.uncertain
        && is_there(name)
    {
        snapshots.insert(name, state.clone());
    }
    for name in SNAPSHOTS {
        assert!(
            !is_there(name) || snapshots.contains_key(name),
            "{said}: nobody made snapshot {name}, or it was deleted"
        );
    }
    for (name, state) in snapshots {
        Store::restore(path, name).unwrap_or_else(|error| panic!("{said}: snapshot {name}: {error}"));
        let store = open().unwrap();
        assert!(Found::in_store(&store, sound, said) == Found::of(&state), "{said}: snapshot {name}");
    }
}

/// What a store has committed: the tensors' bytes, by their indices, and what came with them.
#[derive(PartialEq, Eq)]
struct Found {
    bytes: BTreeMap<usize, Vec<u8>>,
    meta: Value,
}

impl Found {
    /// Reads every tensor.
    fn in_store(store: &Store, sound: &Sound, said: &str) -> Self {
        let mut bytes = BTreeMap::new();
        for (tensor, length) in LENGTHS.into_iter().enumerate() {
            let handle = match store.adopt(&name(tensor), length) {
                Ok(handle) => handle,
                Err(StoreError::Missing { .. }) => continue,
                Err(error) => panic!("{said}: {error}"),
            };
            let loaded = handle.load(sound.pool.lease(length).unwrap()).unwrap().wait();
            let resident = loaded.unwrap_or_else(|failed| panic!("{said}: {failed}"));
            bytes.insert(tensor, resident.bytes().to_vec());
        }
        Self { bytes, meta: store.meta() }
    }

    /// What the model says.
    fn of(State { stamps, meta }: &State) -> Self {
        let bytes = stamps.iter().map(|(&tensor, &stamp)| (tensor, contents(tensor, stamp))).collect();
        Self { bytes, meta: meta.clone() }
    }
}

fn name(tensor: usize) -> String {
    format!("tensor {tensor}")
}

/// The bytes of a tensor that was written with a stamp.
fn contents(tensor: usize, stamp: u64) -> Vec<u8> {
    let byte =
        |index: usize| (index as u64 + 1).wrapping_mul(stamp * 2 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (0..LENGTHS[tensor]).map(|index| (byte(index / 8) >> (index % 8 * 8)) as u8 ^ tensor as u8).collect()
}

fn filled(pool: &Pool, tensor: usize, stamp: u64) -> Block {
    let mut block = pool.lease(LENGTHS[tensor]).unwrap();
    block.copy_from_slice(&contents(tensor, stamp));
    block
}
