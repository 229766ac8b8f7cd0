//! Filters that say for most absent identifiers that they are absent: BinaryFuse8.

use xorf::BinaryFuse8;

use super::DecodeError;

/// What a filter's bytes must be read with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FilterShape {
    pub(crate) seed: u64,
    pub(crate) segment_len: u32,
    pub(crate) segment_count: u32,
}

impl FilterShape {
    /// The number of bytes of such a filter, when there can be one.
    pub(crate) fn len(&self) -> Result<u32, DecodeError> {
        // Three probes fall into three neighbouring segments, so that there are two more than a first may fall into.
        let len = self
            .segment_count
            .checked_add(2)
            .and_then(|n| n.checked_mul(self.segment_len))
            .filter(|len| *len <= MAX_FILTER);
        match len {
            Some(len) if self.segment_len.is_power_of_two() && self.segment_count > 0 => Ok(len),
            _ => Err(DecodeError::corrupt(
                0,
                format!(
                    "a filter of {} segments of {} bytes",
                    self.segment_count, self.segment_len
                ),
            )),
        }
    }
}

/// A filter of keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Filter {
    shape: FilterShape,
    bytes: Vec<u8>,
}

impl Filter {
    /// Builds a filter; the keys are sorted, and equal ones are allowed. `None` when none could be built.
    pub(crate) fn build(mut keys: Vec<u64>) -> Option<Self> {
        keys.dedup();
        let built = BinaryFuse8::try_from(keys).ok()?;
        let of = &built.descriptor;
        let shape = FilterShape {
            seed: of.seed,
            segment_len: of.segment_length,
            segment_count: of.segment_count_length.checked_div(of.segment_length)?,
        };
        Self::from_parts(shape, built.fingerprints.into_vec()).ok()
    }

    /// Takes the bytes of a stored filter.
    pub(crate) fn from_parts(shape: FilterShape, bytes: Vec<u8>) -> Result<Self, DecodeError> {
        if bytes.len() != shape.len()? as usize {
            return Err(DecodeError::corrupt(
                0,
                "the filter's length does not fit its shape",
            ));
        }
        Ok(Self { shape, bytes })
    }

    pub(crate) fn shape(&self) -> FilterShape {
        self.shape
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Whether the key may be among those that the filter was built of.
    ///
    /// Written out, since stored filters must mean the same whatever a later version of the crate that builds them
    /// does; the tests hold the two to each other.
    pub(crate) fn may_hold(&self, key: u64) -> bool {
        let FilterShape {
            seed,
            segment_len,
            segment_count,
        } = self.shape;
        let hash = mix(key.wrapping_add(seed));
        let firsts = u128::from(segment_count).wrapping_mul(u128::from(segment_len));
        let first = (u128::from(hash).wrapping_mul(firsts) >> 64) as u32;
        let mask = segment_len.wrapping_sub(1);
        let second = first.wrapping_add(segment_len);
        let third = second.wrapping_add(segment_len);
        let probes = [
            first,
            second ^ ((hash >> 18) as u32 & mask),
            third ^ (hash as u32 & mask),
        ];
        let print = (hash ^ (hash >> 32)) as u8;
        let found = probes
            .into_iter()
            .try_fold(0_u8, |all, at| Some(all ^ self.bytes.get(at as usize)?));
        // A probe outside cannot be, and must not hide a key.
        found.is_none_or(|found| found == print)
    }
}

/// The end of MurmurHash3.
fn mix(mut hash: u64) -> u64 {
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash ^= hash >> 33;
    hash = hash.wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

const MAX_FILTER: u32 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(n: u64) -> Vec<u64> {
        let mut keys: Vec<u64> = (0..n)
            .map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15))
            .collect();
        keys.sort_unstable();
        keys
    }

    #[test]
    fn stored_filter_holds_each_key_and_few_others() {
        for n in [0, 1, 2, 3, 10, 1000, 60_000] {
            let keys = keys(n);
            let built = Filter::build(keys.clone()).unwrap();
            let stored = Filter::from_parts(built.shape(), built.bytes().to_vec()).unwrap();
            assert!(keys.iter().all(|k| stored.may_hold(*k)), "{n}");
            let wrong = (0..10_000_u64).filter(|k| stored.may_hold(k << 20 | 1));
            if n > 2 {
                assert!(wrong.count() < 100, "{n}");
            }
        }
    }

    proptest! {
        #[test]
        fn hostile_shape_never_reads_outside(
            seed: u64,
            log2 in 0..20_u32,
            segment_count in 0..50_u32,
            probes: Vec<u64>,
        ) {
            let shape = FilterShape { seed, segment_len: 1 << log2, segment_count };
            if let Ok(len) = shape.len() {
                let filter = Filter::from_parts(shape, vec![0; len as usize]).unwrap();
                for key in probes {
                    filter.may_hold(key);
                }
            }
        }
    }
}
