//! State that leaves the records and comes back, in single precision, and what a new record begins with.
//!
//! What is asked for is checked before anything is moved; then one pass goes over the records of those parameters. Masters
//! and moments are turned into numbers, and back, part by part, in the caller's tensors.

use overspill_optim::{Gradient, Isa, Weights};
use overspill_swap::optimizer::{OptimizerError, PartView};

use super::super::recipe::Parameter;
use super::Swapped;
use crate::error::Error;
use crate::tensor::Tensor;

/// One parameter whose state is read or set: single-precision tensors by the names of what they are.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) parameter: usize,
    pub(crate) weight: Tensor,
    pub(crate) fields: Vec<(String, Tensor)>,
}

/// The name of the fp32 master among the fields of a state.
pub(super) const MASTER: &str = "master";

impl Swapped {
    /// Fills tensors with state.
    pub(crate) fn read_state(&mut self, wanted: &mut [Shown]) -> Result<(), Error> {
        let at = self.check_shown(wanted)?;
        let parameters = &self.parameters;
        let swapper = self.swapper.as_mut().ok_or(OptimizerError::Lost)?;
        let mut record = Vec::<u64>::new();
        swapper.read(
            |parameter| at[parameter].is_some(),
            |index, elements, state| {
                let Some(place) = at[index] else { return Ok(()) };
                let Shown { weight, fields, .. } = &mut wanted[place];
                let parameter = &parameters[index];
                for (name, out) in fields {
                    let out = out.floats_mut()?;
                    if name == MASTER {
                        // Numbers are looked at where they are aligned.
                        let state = aligned(&mut record, state);
                        let weights = weight.weights_of(elements.clone())?;
                        parameter.read_masters(state, weights, &mut out[elements.clone()])?;
                    } else {
                        parameter.read_moment(state, elements.clone(), name, out)?;
                    }
                }
                Ok::<_, Error>(())
            },
        )?;
        Ok(())
    }

    /// Sets state, and weights where a master is given; fields that are missing begin anew.
    pub(crate) fn write_state(&mut self, given: &mut [Shown]) -> Result<(), Error> {
        let at = self.check_shown(given)?;
        let (parameters, isa) = (&self.parameters, self.isa);
        let swapper = self.swapper.as_mut().ok_or(OptimizerError::Lost)?;
        swapper.edit(
            |parameter| at[parameter].is_some(),
            |mut part| {
                let Some(place) = at[part.parameter] else { return Ok(()) };
                let Shown { weight, fields, .. } = &mut given[place];
                let parameter = &parameters[part.parameter];
                let elements = part.elements.clone();
                part.state.fill(0);
                match fields.iter().find(|(name, _)| name == MASTER) {
                    Some((_, master)) => {
                        let values = Gradient::F32(&master.floats()?[elements.clone()]);
                        parameter.initialize(isa, &mut part, weight.weights_of(elements.clone())?, values)?;
                    }
                    None => begin(isa, parameter, &mut part, weight)?,
                }
                for (name, values) in fields.iter().filter(|(name, _)| name != MASTER) {
                    parameter.write_moment(part.state, elements.clone(), name, values.floats()?)?;
                }
                Ok::<_, Error>(())
            },
        )?;
        Ok(())
    }

    /// Where each parameter is among `shown`.
    fn check_shown(&self, shown: &[Shown]) -> Result<Vec<Option<usize>>, Error> {
        let mut at = vec![None; self.parameters.len()];
        for (place, Shown { parameter: index, weight, fields }) in shown.iter().enumerate() {
            let parameter = self.check_weight(*index, weight)?;
            let known = self.fields(*index)?;
            for (name, tensor) in fields {
                let shape = known.iter().find(|(known, _)| known == name).map(|(_, shape)| shape);
                // A weight without another master may be given as one.
                let numel = match shape {
                    Some(shape) => shape.iter().product(),
                    None if name == MASTER => parameter.numel,
                    None => return Err(Error::Argument(format!("{} has no {name}", parameter.name))),
                };
                let found = tensor.floats()?.len();
                if found != numel {
                    let message = format!("{name} of {} has {found} elements, not {numel}", parameter.name);
                    return Err(Error::Argument(message));
                }
            }
            if at[*index].replace(place).is_some() {
                return Err(Error::Argument(format!("{} was given twice", parameter.name)));
            }
        }
        Ok(at)
    }
}

/// Begins the state of a part with its weights as masters.
pub(super) fn begin(
    isa: Isa,
    parameter: &Parameter,
    part: &mut PartView<'_>,
    weight: &mut Tensor,
) -> Result<(), Error> {
    let elements = part.elements.clone();
    let mut initialize =
        |weights: Weights<'_>, values: Gradient<'_>| parameter.initialize(isa, part, weights, values);
    match weight.weights_of(elements)? {
        Weights::F32(weights) => {
            let values = weights.to_vec();
            initialize(Weights::F32(weights), Gradient::F32(&values))
        }
        Weights::Bf16(weights) => {
            let values = weights.to_vec();
            initialize(Weights::Bf16(weights), Gradient::Bf16(&values))
        }
        Weights::F16(weights) => {
            let values = weights.to_vec();
            initialize(Weights::F16(weights), Gradient::F16(&values))
        }
    }
}

/// A copy of `bytes` where numbers may lie.
fn aligned<'a>(room: &'a mut Vec<u64>, bytes: &[u8]) -> &'a mut [u8] {
    room.resize(bytes.len().div_ceil(size_of::<u64>()), 0);
    let copy = &mut bytemuck::cast_slice_mut(room)[..bytes.len()];
    copy.copy_from_slice(bytes);
    copy
}
