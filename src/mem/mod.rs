//! Memory: the arena, its NUMA placement, and its limits. Knows no blocks: slots are the cache's.
