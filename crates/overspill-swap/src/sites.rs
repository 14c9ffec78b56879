//! The directories that a store is to lie over: what is known of each one's disk, who serves it, and its
//! share.
//!
//! ```text
//! the disk's profile ──────────┐
//! data files, if it is opened ─┴─► VolumeSite ──► VolumeSites::open ──► ServedVolume { engines, share, speed }
//! ```
//!
//! Nothing is made in the directories here: that is up to `Store::create_over` and `Store::open_over`, which
//! take the volumes. Several share the data in proportion to their bandwidths, and one whose bandwidth nobody
//! knows is measured; a store that is opened is served as it was made. Dropping what was opened stops the
//! engines. Nothing but speed depends on a profile: one that cannot be used stops nobody, and is told.

use std::path::{Path, PathBuf};

use overspill_io::{Engine, EngineConfig, EngineReport, Pool};

use crate::bandwidth::{Bandwidth, measure};
use crate::error::StoreError;
use crate::manifest::Manifest;
use crate::profile::Profile;
use crate::store::Store;
use crate::volume::{Volume, weights};

/// What an engine takes beside its blocks: stacks and heaps of its threads, and its ring by the depth of the
/// queue.
const ENGINE_BYTES: usize = 512 << 10;
const QUEUE_ENTRY_BYTES: usize = 512;

/// A place for a volume.
#[derive(Clone, Debug)]
pub struct VolumeSite {
    /// The directory in which the volume's own is, or is to be made; what has to be measured is measured
    /// there.
    pub directory: PathBuf,
    /// The volume's own directory.
    pub store: PathBuf,
    /// What is known of the disk.
    pub profile: Option<Profile>,
    /// Why a profile that is there cannot be used, and what that means: in a line, for the user.
    pub flaw: Option<String>,
    /// Engines side by side, each with a data file of its own.
    rings: usize,
}

/// All places of a store, the home first.
#[derive(Debug)]
pub struct VolumeSites {
    sites: Vec<VolumeSite>,
    /// What was committed there, if the store is opened.
    committed: Option<Manifest>,
}

/// A volume whose engines are at work.
#[derive(Debug)]
pub struct ServedVolume {
    /// For the store.
    pub volume: Volume,
    /// Bytes of a chunk of each engine.
    pub chunk_bytes: usize,
    /// Chunks that each engine has with the kernel at a time.
    pub queue_depth: usize,
    /// Its speed, if it is known.
    pub bandwidth: Option<Bandwidth>,
    /// What was measured just now, for whoever wants to [`Profile::save`] it.
    pub measured: Option<Profile>,
}

impl VolumeSite {
    /// A volume's directory `store` in `directory`, on a disk of this profile.
    pub fn new(directory: PathBuf, store: PathBuf, profile: Option<Profile>) -> Self {
        let rings = profile.as_ref().map_or(1, |profile| profile.rings);
        Self { directory, store, profile, flaw: None, rings }
    }

    /// As [`VolumeSite::new`], with the profile that counts for the directories. Of a disk whose profile cannot be used
    /// nothing is known.
    pub fn find(directory: PathBuf, store: PathBuf) -> Self {
        match Profile::load(&store) {
            Ok(profile) => Self::new(directory, store, profile),
            Err(error) => {
                let flaw = Some(format!("{error}; the disk is used as if nothing were known of it"));
                Self { flaw, ..Self::new(directory, store, None) }
            }
        }
    }

    fn bandwidth(&self) -> Option<Bandwidth> {
        let Profile { read_gbps, write_gbps, .. } = *self.profile.as_ref()?;
        Some(Bandwidth { read_gbps, write_gbps })
    }

    /// How its engines work.
    fn config(&self, config: &EngineConfig) -> EngineConfig {
        match self.profile {
            Some(Profile { chunk_bytes, queue_depth, .. }) => {
                EngineConfig { chunk_bytes, queue_depth, ..config.clone() }
            }
            None => config.clone(),
        }
    }

    /// Starts its engines, and measures the disk if its speed is needed.
    fn serve(&self, config: &EngineConfig, pool: &Pool, is_needed: bool) -> Result<ServedVolume, StoreError> {
        let config = self.config(config);
        let start = || Engine::start(config.clone(), pool);
        let engines = (0..self.rings).map(|_| start()).collect::<Result<Vec<_>, _>>()?;
        let EngineConfig { chunk_bytes, queue_depth, .. } = config;
        let (mut bandwidth, mut measured) = (self.bandwidth(), None);
        if is_needed && bandwidth.is_none() {
            let found = measure(&self.directory, &engines, pool)?;
            let Bandwidth { read_gbps, write_gbps } = found;
            measured = Some(Profile { chunk_bytes, queue_depth, rings: self.rings, read_gbps, write_gbps });
            bandwidth = Some(found);
        }
        let volume = Volume { directory: self.store.clone(), engines, weight: 1 };
        Ok(ServedVolume { volume, chunk_bytes, queue_depth, bandwidth, measured })
    }
}

impl VolumeSites {
    /// Those of a store that is to be made; at least one.
    pub fn to_make(sites: Vec<VolumeSite>) -> Self {
        Self { sites, committed: None }
    }

    /// Those of a store that is to be opened; `committed` is what its home has.
    pub fn to_open(mut sites: Vec<VolumeSite>, committed: Manifest) -> Self {
        for site in &mut sites {
            // What was made with some number of data files has that number.
            site.rings = Store::data_files(&site.store).max(1);
        }
        Self { sites, committed: Some(committed) }
    }

    /// Each of them, in the order in which they were given.
    pub fn iter(&self) -> impl Iterator<Item = &VolumeSite> {
        self.sites.iter()
    }

    /// What was committed there, if the store is to be opened.
    pub fn committed(&self) -> Option<&Manifest> {
        self.committed.as_ref()
    }

    /// What their engines take, in bytes, as far as that is more than a single one of the usual depth.
    pub fn memory_bytes(&self) -> usize {
        let usual = EngineConfig::default();
        let of_site = |site: &VolumeSite| site.rings * engine_bytes(site.config(&usual).queue_depth);
        self.iter().map(of_site).sum::<usize>().saturating_sub(engine_bytes(usual.queue_depth))
    }

    /// Finds out whether the store can be made with `storage_bytes` bytes. Before all bandwidths are known,
    /// nobody can say whether each disk has room for its share; then it is found out when the store is made.
    ///
    /// # Errors
    /// As [`Store::check_over`].
    pub fn check(&self, storage_bytes: u64) -> Result<(), StoreError> {
        let (shares, storage_bytes) = match self.known() {
            Some(bandwidths) => (weights(&bandwidths), storage_bytes),
            None => (vec![1; self.sites.len()], 0),
        };
        let volumes: Vec<_> = self.iter().zip(shares).map(|(site, share)| (&*site.store, share)).collect();
        Store::check_over(&volumes, storage_bytes)
    }

    /// Starts the engines, all of them over `pool`, and measures what has to be measured. What the profiles
    /// say of chunks and queues counts before what `config` does.
    ///
    /// # Errors
    /// [`StoreError`] when an engine can't be started, or a directory can't be written; nothing is left behind.
    pub fn open(&self, config: &EngineConfig, pool: &Pool) -> Result<Vec<ServedVolume>, StoreError> {
        let is_needed = self.sites.len() > 1 && self.committed.is_none();
        let serve = |site: &VolumeSite| site.serve(config, pool, is_needed);
        let mut served = self.iter().map(serve).collect::<Result<Vec<_>, _>>()?;
        let shares = self.shares(&served);
        for (served, share) in served.iter_mut().zip(shares) {
            served.volume.weight = share;
        }
        Ok(served)
    }

    /// Each volume's share: what it was when the store was made, or by bandwidth.
    fn shares(&self, served: &[ServedVolume]) -> Vec<u32> {
        let Some(manifest) = &self.committed else {
            let gbps = |served: &ServedVolume| served.bandwidth.map_or(1.0, Bandwidth::mean_gbps);
            return weights(&served.iter().map(gbps).collect::<Vec<_>>());
        };
        let mut lanes = manifest.lanes.iter().map(|lane| lane.weight);
        let share = |site: &VolumeSite| lanes.by_ref().take(site.rings).fold(0, u32::saturating_add);
        self.iter().map(share).collect()
    }

    /// The bandwidths of all volumes, if they are known; of a single one it does not matter.
    fn known(&self) -> Option<Vec<f64>> {
        match &*self.sites {
            [_] => Some(vec![1.0]),
            several => several.iter().map(|site| site.bandwidth().map(Bandwidth::mean_gbps)).collect(),
        }
    }
}

impl ServedVolume {
    /// The directory of its volume.
    pub fn directory(&self) -> &Path {
        &self.volume.directory
    }

    /// What its engines work with; each thing is said once.
    pub fn report(&self) -> EngineReport {
        let mut reports = self.volume.engines.iter().map(Engine::report);
        let first = reports.next().expect("a volume has at least one engine");
        reports.fold(first, |mut merged, report| {
            merged.degraded = merged.degraded.or(report.degraded);
            merged.notes.extend(report.notes);
            merged.notes.dedup();
            merged
        })
    }
}

fn engine_bytes(queue_depth: usize) -> usize {
    ENGINE_BYTES + queue_depth * QUEUE_ENTRY_BYTES
}

#[cfg(test)]
mod tests {
    use overspill_io::{BackendChoice, BlockClass};

    use super::*;
    use crate::ledger::Durability;

    const SLOW: Profile =
        Profile { chunk_bytes: 1 << 16, queue_depth: 8, rings: 2, read_gbps: 1.0, write_gbps: 1.0 };
    const FAST: Profile = Profile { rings: 1, read_gbps: 4.0, write_gbps: 2.4, ..SLOW };

    fn site(folder: &Path, name: &str, profile: Option<Profile>) -> VolumeSite {
        VolumeSite::new(folder.to_owned(), folder.join(name), profile)
    }

    fn pool() -> Pool {
        Pool::new(&[BlockClass { name: "test", block_bytes: 1 << 20, count: 2 }]).unwrap()
    }

    fn threads() -> EngineConfig {
        EngineConfig { backend: BackendChoice::Threads, ..EngineConfig::default() }
    }

    #[test]
    fn profiles_say_how_engines_work_and_what_each_volume_gets() {
        let folder = tempfile::tempdir().unwrap();
        let sites = [site(folder.path(), "slow", Some(SLOW)), site(folder.path(), "fast", Some(FAST))];
        let sites = VolumeSites::to_make(sites.into());
        let [slow, fast] = &sites.open(&threads(), &pool()).unwrap()[..] else { panic!("two volumes") };
        assert_eq!((slow.volume.weight, fast.volume.weight), (1, 3));
        assert_eq!((slow.volume.engines.len(), fast.volume.engines.len()), (2, 1));
        assert_eq!((slow.chunk_bytes, slow.queue_depth), (1 << 16, 8));
        assert_eq!((&slow.measured, &fast.measured), (&None, &None));
    }

    #[test]
    fn a_profile_that_cannot_be_used_is_told_and_nothing_is_known_of_the_disk() {
        let folder = tempfile::tempdir().unwrap();
        let find = || VolumeSite::find(folder.path().to_owned(), folder.path().join("store"));
        assert_eq!((find().profile, find().flaw), (None, None));
        SLOW.save(folder.path()).unwrap();
        assert_eq!((find().profile, find().flaw), (Some(SLOW), None));
        std::fs::write(folder.path().join(Profile::FILE), "{").unwrap();
        let (profile, flaw) = (find().profile, find().flaw.unwrap());
        assert!(profile.is_none() && flaw.contains("is not a profile") && !flaw.contains('\n'), "{flaw}");
        let sites = VolumeSites::to_make(vec![find()]);
        let [served] = &sites.open(&threads(), &pool()).unwrap()[..] else { panic!("one volume") };
        assert_eq!((served.volume.engines.len(), served.bandwidth), (1, None));
    }

    #[test]
    fn engines_beyond_the_usual_one_take_memory() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = |sites: &[Option<Profile>]| {
            let site = |profile: &Option<Profile>| site(folder.path(), "store", profile.clone());
            VolumeSites::to_make(sites.iter().map(site).collect()).memory_bytes()
        };
        let usual = EngineConfig::default().queue_depth;
        assert_eq!(bytes(&[None]), 0);
        assert_eq!(bytes(&[None, None]), engine_bytes(usual));
        assert_eq!(bytes(&[Some(SLOW), Some(FAST)]), 3 * engine_bytes(8) - engine_bytes(usual));
        assert_eq!(bytes(&[Some(FAST)]), 0, "a shallow queue gives nothing back");
    }

    #[test]
    fn only_a_volume_among_several_is_measured_and_nothing_is_left_behind() {
        let folder = tempfile::tempdir().unwrap();
        let alone = VolumeSites::to_make(vec![site(folder.path(), "a", None)]);
        let [served] = &alone.open(&threads(), &pool()).unwrap()[..] else { panic!("one volume") };
        assert_eq!((served.bandwidth, &served.measured), (None, &None));
        let several =
            VolumeSites::to_make(vec![site(folder.path(), "a", None), site(folder.path(), "b", Some(FAST))]);
        let [first, second] = &several.open(&threads(), &pool()).unwrap()[..] else { panic!("two volumes") };
        let (found, measured) = (first.bandwidth.unwrap(), first.measured.as_ref().unwrap());
        assert_eq!((measured.read_gbps, measured.write_gbps), (found.read_gbps, found.write_gbps));
        assert!(second.measured.is_none());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_opened_store_is_served_as_it_was_made_whatever_the_profile_says_now() {
        let folder = tempfile::tempdir().unwrap();
        let sites = |slow: Option<Profile>| {
            vec![site(folder.path(), "slow", slow), site(folder.path(), "fast", Some(FAST))]
        };
        let volumes =
            |served: Vec<ServedVolume>| served.into_iter().map(|served| served.volume).collect::<Vec<_>>();
        let made = volumes(VolumeSites::to_make(sites(Some(SLOW))).open(&threads(), &pool()).unwrap());
        let store = Store::create_over(&made, Durability::Step, 1 << 20).unwrap();
        store.commit(serde_json::Value::Null).unwrap();
        store.keep();
        drop((store, made));
        for now in [None, Some(Profile { rings: 5, read_gbps: 100.0, ..SLOW })] {
            let manifest = Store::committed(&folder.path().join("slow")).unwrap();
            let opened =
                volumes(VolumeSites::to_open(sites(now), manifest).open(&threads(), &pool()).unwrap());
            let shape = |volume: &Volume| (volume.engines.len(), volume.weight);
            // Two lanes of one part each, and one of six.
            assert_eq!(opened.iter().map(shape).collect::<Vec<_>>(), [(2, 2), (1, 6)]);
            Store::open_over(&opened, Durability::Step).unwrap();
        }
    }
}
