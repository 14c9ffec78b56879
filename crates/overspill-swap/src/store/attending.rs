//! What other processes want of the store, looked for after each commit: snapshots that are wished for, and those
//! whose names were taken away. [`crate::wish`] says how it is asked for, and why no order of events loses anything.
//!
//! Nothing here fails a commit, which is over by then: a wish that cannot be granted is told why.

use std::io;

use overspill_io::IoError;

use super::{Standing, State, Store};
use crate::error::StoreError;
use crate::snapshot;
use crate::wish::{self, Sight, Taken};

impl Store {
    /// Looks at the directory once, and does what is wished for.
    pub(super) fn attend(&self, state: &mut State) {
        let Ok(Sight { snapshots, wishes }) = wish::look(self.path()) else { return };
        let missing: Vec<String> = state
            .ledger
            .pins()
            .filter(|pin| !snapshots.iter().any(|name| name == pin))
            .map(str::to_owned)
            .collect();
        // First, so that a name that was given up can be wished for again.
        self.let_go(state, missing);
        for name in wishes {
            let Some(taken) = Taken::take(self.path(), &name) else { continue };
            // It may have been given up since the names were read.
            self.let_go(state, vec![name.clone()]);
            let is_there = state.ledger.pins().any(|pin| pin == name);
            let granted = if is_there { self.flush_names(state) } else { self.keep_committed(state, &name) };
            match granted {
                Ok(()) => taken.grant(),
                Err(error) => {
                    // Nobody may be left to collect the answer.
                    self.inner.home.forget([wish::file_name(&name)].into_iter());
                    taken.refuse(&error.to_string());
                }
            }
        }
    }

    /// Gives up the pins whose names are durably gone.
    pub(super) fn let_go(&self, state: &mut State, mut names: Vec<String>) {
        // A list that others change while it is read may lack a name; the name itself is asked for.
        names.retain(|name| {
            let found = std::fs::symlink_metadata(snapshot::path(self.path(), name));
            let is_gone = found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound);
            is_gone && state.ledger.pins().any(|pin| pin == name)
        });
        if !names.is_empty() && self.flush_names(state).is_ok() {
            for name in names {
                state.ledger.unpin(&name);
            }
        }
    }

    /// Gives the committed generation one more name, and keeps what it names. The room that the steps to come will miss
    /// then is taken before, so that no step fails for a snapshot.
    pub(super) fn keep_committed(&self, state: &mut State, name: &str) -> Result<(), StoreError> {
        if !matches!(state.standing, Standing::Committed { .. }) {
            return Err(StoreError::NothingCommitted { path: self.path().to_owned() });
        }
        let records = state.ledger.committed_records();
        if state.ledger.pin(name, &records).is_err() {
            return Err(StoreError::SnapshotExists { name: name.to_owned(), path: self.path().to_owned() });
        }
        let made = self.make_room(state, name).and_then(|()| snapshot::make(self.path(), name));
        if let Err(error) = made {
            state.ledger.unpin(name);
            return Err(error);
        }
        // From here on the name may be found, durable or not, so what it names stays.
        self.flush_names(state)
    }

    /// Makes the data files long enough for the steps to come and everything that is pinned.
    fn make_room(&self, state: &mut State, name: &str) -> Result<(), StoreError> {
        let room = state.ledger.room_bytes(state.ledger.needed_bytes());
        self.grow_to(state, room).map_err(|error| match error {
            StoreError::Io(IoError::NoSpace { needed, free: available, .. }) => {
                let (name, path) = (name.to_owned(), self.path().to_owned());
                StoreError::SnapshotRoom { name, path, needed, available }
            }
            error => error,
        })
    }

    /// Makes the names in the home durable. Once that has failed nobody knows what a later success is worth; if it is not
    /// even tried, because the home is not where it was, it can be tried again.
    pub(super) fn flush_names(&self, state: &mut State) -> Result<(), StoreError> {
        if state.names_unknown {
            return Err(StoreError::Poisoned { path: self.path().to_owned() });
        }
        self.inner.home.check_own()?;
        let flushed = self.inner.home.sync();
        state.names_unknown = flushed.is_err();
        // By its path, which may have led elsewhere meanwhile.
        self.inner.home.check_own()?;
        flushed.map_err(|source| StoreError::directory("flush", self.path(), source))
    }
}
