//! Tests: system calls refused to the current thread and those it starts, as containers and sandboxes do.

use std::mem::offset_of;

/// A system call that is refused.
pub(super) struct Refusal {
    pub(super) call: libc::c_long,
    /// Only where this argument, as 32 bits, has all of these bits.
    pub(super) argument: Option<(usize, u32)>,
    /// Only where this argument is exactly this.
    pub(super) equals: Option<(usize, u32)>,
    pub(super) errno: i32,
}

impl Refusal {
    pub(super) fn of(call: libc::c_long, errno: i32) -> Self {
        Self { call, argument: None, equals: None, errno }
    }
}

/// Runs `body` on a thread of its own to which the calls are refused.
pub(super) fn refused<T: Send + 'static>(
    refusals: Vec<Refusal>,
    body: impl FnOnce() -> T + Send + 'static,
) -> T {
    let run = move || {
        install(&refusals);
        body()
    };
    std::thread::spawn(run).join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn statement(code: u32, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt: 0, jf: 0, k }
}

fn jump(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

fn install(refusals: &[Refusal]) {
    const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
    const IF_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
    const IF_SET: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
    const RETURN: u32 = libc::BPF_RET | libc::BPF_K;
    let argument = |index: usize| (offset_of!(libc::seccomp_data, args) + 8 * index) as u32;
    let mut program = Vec::new();
    for refusal in refusals {
        // Each rule is seven statements long; a mismatch jumps to the next rule.
        let (set, bits) = refusal.argument.unwrap_or((0, 0));
        let (equal, value) = refusal.equals.unwrap_or((0, 0));
        program.push(statement(LOAD, offset_of!(libc::seccomp_data, nr) as u32));
        program.push(jump(IF_EQUAL, refusal.call as u32, 0, 5));
        program.push(statement(LOAD, argument(set)));
        program.push(jump(IF_SET, bits, 0, if bits == 0 { 0 } else { 3 }));
        program.push(statement(LOAD, argument(equal)));
        let otherwise = if refusal.equals.is_none() { 0 } else { 1 };
        program.push(jump(IF_EQUAL, value, 0, otherwise));
        program.push(statement(RETURN, libc::SECCOMP_RET_ERRNO | refusal.errno as u32));
    }
    program.push(statement(RETURN, libc::SECCOMP_RET_ALLOW));
    let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: both calls read plain arguments and the program, which lives until they return.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        let mode = libc::SECCOMP_MODE_FILTER;
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, mode, &raw const filter), 0);
    }
}
