//! The Posix tier: segments, manifests and the index over them, in every storage backend.
//!
//! Knows files and parts; knows no devices, no slots and no tasks. See `docs/format.md`.
