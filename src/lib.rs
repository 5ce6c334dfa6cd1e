//! UCM: a KV-cache storage engine. Servers save the KV blocks of a prompt to storage that every
//! node reaches, and load them back instead of recomputing them.
