//! Ascend prefills, CUDA decodes, and the other way round: two processes that share nothing but a folder, each
//! with a device of its own make and pages laid out as that make's kernels want them.
//!
//! Children are this test binary again, started on the test `child`.

use std::ffi::c_void;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use tempfile::TempDir;
use ucm::block::BlockId;
use ucm::store::{Batch, Store};
use ucm::task::Stage;

use crate::common::{batch, done, options};
use crate::fakes::{ALL, Fake, Kind, Memory};

const LAYERS: usize = 4;
const TOKENS: usize = 16;
const HEADS: usize = 2;
/// A head of 64 elements of two bytes.
const HEAD: usize = 128;
/// K, or V, of one layer of one block.
const HALF: usize = TOKENS * HEADS * HEAD;
const BLOCK: usize = LAYERS * 2 * HALF;
const BLOCKS: usize = 24;

/// How a server's pages lie in its device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pages {
    /// `[2][layer][block][token][head]`: K and V are tensors of their own, whole runs a block (Ascend).
    Split,
    /// `[layer][block][token][K, V][head]`: K and V of a token lie side by side (CUDA).
    Packed,
}

impl Pages {
    /// Where a block's half of a layer begins.
    fn start(self, layer: usize, half: usize, block: usize) -> usize {
        match self {
            Self::Split => ((half * LAYERS + layer) * BLOCKS + block) * HALF,
            Self::Packed => (layer * BLOCKS + block) * 2 * HALF + half * HEADS * HEAD,
        }
    }

    /// From one token to the next.
    fn token_stride(self) -> usize {
        match self {
            Self::Split => HEADS * HEAD,
            Self::Packed => 2 * HEADS * HEAD,
        }
    }

    /// The option that says so: the bytes of both go to storage as K, then V, token by token.
    fn shapes(self) -> String {
        let slice = match self {
            Self::Split => HALF.to_string(),
            Self::Packed => format!("{},{TOKENS}:{}", HEADS * HEAD, self.token_stride()),
        };
        vec![slice; 2 * LAYERS].join(";")
    }

    /// The addresses of this block's slices, for each layer K and V.
    fn addresses(self, base: *mut u8, block: usize) -> impl Iterator<Item = *mut c_void> {
        (0..2 * LAYERS).map(move |at| base.wrapping_add(self.start(at / 2, at % 2, block)).cast())
    }

    /// Every byte of the block at this page, by what it means: layer, K or V, token, byte of the token.
    fn places(self, block: usize) -> impl Iterator<Item = (usize, usize)> {
        (0..BLOCK).map(move |byte| {
            let (layer, within) = (byte / (2 * HALF), byte % (2 * HALF));
            let (half, within) = (within / HALF, within % HALF);
            let (token, within) = (within / (HEADS * HEAD), within % (HEADS * HEAD));
            (byte, self.start(layer, half, block) + token * self.token_stride() + within)
        })
    }
}

/// The KV of a token sequence's block: every byte is decided by which block it is and what it means there.
fn kv(block: usize, byte: usize) -> u8 {
    let word = (((block as u64) << 40) ^ (byte as u64 / 8)).wrapping_mul(0xD6E8_FEB8_6659_FD93);
    (word >> (byte % 8 * 8)) as u8
}

fn open(directory: &Path, kind: Kind, pages: Pages) -> Arc<Store> {
    let (shapes, block, tokens) = (pages.shapes(), BLOCK.to_string(), TOKENS.to_string());
    let pairs = [
        ("storage_backends", directory.to_str().unwrap()),
        ("cache_buffer_capacity_gb", "0.004"),
        ("segment_size_mb", "8"),
        ("model_id", "a model that both serve"),
        ("order", "nhd-split"),
        ("tensor_shape_list", shapes.as_str()),
        ("block_size", block.as_str()),
        ("block_tokens", tokens.as_str()),
        ("device", kind.device),
        ("device_id", "0"),
    ];
    Store::open(options(&pairs).build().unwrap()).unwrap()
}

/// Both servers name the prompt's blocks by themselves, from its tokens.
fn names(store: &Store) -> Vec<BlockId> {
    let prompt: Vec<u32> = (0..(BLOCKS * TOKENS) as u32).map(|token| token * 7 + 3).collect();
    let mut ids = vec![BlockId::default(); BLOCKS];
    store.hash_tokens(&prompt, TOKENS, None, &[], &mut ids).unwrap();
    ids
}

/// Which page block `number` of the prompt is in: the two servers have given them out differently.
fn page(number: usize, server: usize) -> usize {
    (number * if server == 0 { 5 } else { 11 } + server) % BLOCKS
}

fn all_addresses(memory: &Memory<'_>, pages: Pages, server: usize) -> Vec<*mut c_void> {
    (0..BLOCKS).flat_map(|number| pages.addresses(memory.base, page(number, server))).collect()
}

/// Computes the prompt's KV on a stream, and saves it while the kernels are running.
fn prefill(directory: &Path, fake: &Fake, pages: Pages) {
    let store = open(directory, fake.kind(), pages);
    let memory = fake.alloc(BLOCKS * BLOCK);
    let mut bytes = vec![0; BLOCKS * BLOCK];
    for number in 0..BLOCKS {
        pages.places(page(number, 0)).for_each(|(byte, at)| bytes[at] = kv(number, byte));
    }
    let (stream, event) = (fake.stream(), fake.event());
    stream.write(memory.base, &bytes, 20_000);
    event.record(&stream);
    let (ids, addresses) = (names(&store), all_addresses(&memory, pages, 0));
    let saved = Batch { wait_event: event.event, ..batch(&ids, None, &addresses) };
    // SAFETY: the memory lives until the task is released, the event until submit returns.
    let task = unsafe { store.save(&saved) }.unwrap();
    done(&task, Stage::Persisted);
    done(&task, Stage::Released);
    store.close();
}

/// Finds the prompt by its tokens, loads it, and reads every byte behind the stream that waits for the load.
fn decode(directory: &Path, fake: &Fake, pages: Pages) {
    let store = open(directory, fake.kind(), pages);
    let ids = names(&store);
    assert_eq!(store.lookup_prefix(&ids).unwrap(), BLOCKS, "the prompt is not there");
    let (memory, stream) = (fake.alloc(BLOCKS * BLOCK), fake.stream());
    memory.write(&vec![0xEE; BLOCKS * BLOCK]);
    let addresses = all_addresses(&memory, pages, 1);
    // SAFETY: the memory lives until the task is released, and the stream until it is destroyed below.
    let task = unsafe {
        let task = store.load(&batch(&ids, None, &addresses)).unwrap();
        store.stream_wait(&task, stream.stream).unwrap();
        task
    };
    let mut seen = vec![0; BLOCKS * BLOCK];
    stream.read(&mut seen, memory.base);
    stream.sync();
    for number in 0..BLOCKS {
        let wrong = pages.places(page(number, 1)).find(|(byte, at)| seen[*at] != kv(number, *byte));
        assert_eq!(wrong, None, "block {number}: (byte, place)");
    }
    done(&task, Stage::Loaded);
    done(&task, Stage::Released);
    println!("decoded {} bytes", seen.len());
    store.close();
}

const ROLE: &str = "UCM_TEST_SERVER";
const DIRECTORY: &str = "UCM_TEST_DIRECTORY";
const KIND: &str = "UCM_TEST_SERVER_KIND";

#[test]
#[ignore = "the body of the child processes"]
fn child() {
    let variable = |name| std::env::var(name).unwrap();
    let fake = Fake::take(ALL[variable(KIND).parse::<usize>().unwrap()]);
    let pages = if fake.is_cuda() { Pages::Packed } else { Pages::Split };
    let directory = variable(DIRECTORY);
    match variable(ROLE).as_str() {
        "prefill" => prefill(Path::new(&directory), &fake, pages),
        _ => decode(Path::new(&directory), &fake, pages),
    }
    fake.assert_no_leak();
}

fn serve(role: &str, kind: usize, directory: &Path) -> String {
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "platforms::child", "--ignored", "--nocapture"])
        .env(ROLE, role)
        .env(KIND, kind.to_string())
        .env(DIRECTORY, directory)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{role} on {:?}: {text}{errors}", ALL[kind]);
    text
}

/// Goal: what one make of device has computed the other decodes, in pages of another layout, byte for byte;
/// whatever way each copies in.
#[test]
fn one_make_prefills_and_the_other_decodes() {
    let of =
        |device: &str| (0..ALL.len()).filter(|&at| ALL[at].device == device).collect::<Vec<_>>();
    for (prefill, decode) in [("ascend", "cuda"), ("cuda", "ascend")] {
        let (prefills, decodes) = (of(prefill), of(decode));
        for at in 0..prefills.len().max(decodes.len()) {
            let directory = TempDir::new().unwrap();
            serve("prefill", prefills[at % prefills.len()], directory.path());
            let text = serve("decode", decodes[at % decodes.len()], directory.path());
            assert!(text.contains(&format!("decoded {} bytes", BLOCKS * BLOCK)), "{text}");
        }
    }
}
