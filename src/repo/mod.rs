//! The deduplicated chunk repository: formats at rest, storage, packs, index, maps and snapshots.
