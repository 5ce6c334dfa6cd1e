//! The DRAM tier: which slot holds which part, what is evicted next, and the table that lets lookup-only
//! stores of the host see DRAM hits.
