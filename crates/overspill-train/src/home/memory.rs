//! The reference: all training state in ordinary memory, one array per unit, no tiles, no store.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

use super::buffer::Buffer;
use super::io::IoReport;
use super::{GradientStart, Home, Left, SavedInput, Source, Update, Visit};
use crate::error::{TrainError, check_stop};
use crate::layout::{ModelLayout, Unit};

/// Keeps everything in memory.
#[derive(Debug)]
pub struct MemoryHome {
    layout: ModelLayout,
    units: Vec<UnitState>,
    inputs: HashMap<(usize, usize), Bytes>,
}

/// The arrays of one unit, `UnitLayout::padded` elements each.
#[derive(Debug)]
struct UnitState {
    weights: Arc<Floats>,
    gradient: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

/// Weights that tensors may share.
#[derive(Debug)]
struct Floats(Vec<f32>);

/// A tensor's share of the weights.
struct Shared(Arc<Floats>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0.0)
    }
}

impl MemoryHome {
    /// Makes room for a model and fills its weights.
    ///
    /// # Errors
    /// What `source` fails with.
    pub fn new(layout: &ModelLayout, source: &mut Source<'_>) -> Result<Self, TrainError> {
        let mut units = Vec::with_capacity(layout.units().len());
        for unit in layout.units() {
            let zeros = || vec![0.0; unit.padded];
            let mut weights = zeros();
            source(unit, &mut weights)?;
            units.push(UnitState {
                weights: Arc::new(Floats(weights)),
                gradient: zeros(),
                exp_avg: zeros(),
                exp_avg_sq: zeros(),
            });
        }
        Ok(Self { layout: layout.clone(), units, inputs: HashMap::new() })
    }
}

impl Home for MemoryHome {
    fn announce(&mut self, _visits: Vec<Visit>) -> Result<(), TrainError> {
        Ok(())
    }

    fn weights(&mut self, unit: Unit) -> Result<Bytes, TrainError> {
        let state = &self.units[self.layout.index(unit)];
        Ok(Bytes::from_owner(Shared(state.weights.clone())))
    }

    fn gradient(&mut self, unit: Unit, start: GradientStart) -> Result<Buffer, TrainError> {
        let mut gradient = std::mem::take(&mut self.units[self.layout.index(unit)].gradient);
        if start == GradientStart::Zero {
            gradient.fill(0.0);
        }
        Ok(Buffer::Owned(gradient))
    }

    fn put_gradient(&mut self, unit: Unit, gradient: Buffer) -> Result<(), TrainError> {
        let Buffer::Owned(gradient) = gradient else { unreachable!("this home hands out no other buffers") };
        self.units[self.layout.index(unit)].gradient = gradient;
        Ok(())
    }

    fn save_input(&mut self, which: SavedInput, input: &[f32]) -> Result<(), TrainError> {
        let copy = Arc::new(Floats(input.to_vec()));
        self.inputs.insert((which.layer, which.micro), Bytes::from_owner(Shared(copy)));
        Ok(())
    }

    fn saved_input(&mut self, which: SavedInput) -> Result<Bytes, TrainError> {
        let input = self.inputs.remove(&(which.layer, which.micro));
        Ok(input.expect("an input is saved before it is asked for"))
    }

    fn update(&mut self, update: &Update<'_>) -> Result<(), TrainError> {
        for (layout, state) in self.layout.units().iter().zip(&mut self.units) {
            check_stop(update.stop)?;
            let weights =
                Arc::get_mut(&mut state.weights).expect("no tensor outlives its pass over the layer");
            update.apply(
                layout,
                0,
                &mut weights.0,
                &state.gradient,
                &mut state.exp_avg,
                &mut state.exp_avg_sq,
            );
        }
        Ok(())
    }

    fn settle(&mut self) -> Result<(), TrainError> {
        Ok(())
    }

    fn commit(&mut self, _step: u64) -> Result<(), TrainError> {
        Ok(())
    }

    fn left(&self) -> Option<Left> {
        None
    }

    fn io(&self) -> Option<IoReport> {
        None
    }
}
