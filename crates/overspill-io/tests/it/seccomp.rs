//! System calls that are forbidden, as container runtimes do it: by a filter that the kernel asks for every call.
#![expect(unsafe_code, reason = "a filter is installed by system calls that take raw structures")]

use libc::{BPF_ABS, BPF_JEQ, BPF_JMP, BPF_K, BPF_LD, BPF_RET, BPF_W, sock_filter, sock_fprog};

/// From here on, each of `calls`, by whatever thread of this process, is answered with the errno beside it. Nobody can
/// take that back.
pub(crate) fn forbid(calls: &[(libc::c_long, i32)]) {
    let statement = |code: u32, jump_if_not: u8, operand: u32| sock_filter {
        code: u16::try_from(code).unwrap(),
        jt: 0,
        jf: jump_if_not,
        k: operand,
    };
    // The call's number is what the kernel describes a call by first. This binary makes calls of one architecture.
    let mut program = vec![statement(BPF_LD | BPF_W | BPF_ABS, 0, 0)];
    for &(call, errno) in calls {
        program.push(statement(BPF_JMP | BPF_JEQ | BPF_K, 1, u32::try_from(call).unwrap()));
        program.push(statement(BPF_RET | BPF_K, 0, libc::SECCOMP_RET_ERRNO | errno.cast_unsigned()));
    }
    program.push(statement(BPF_RET | BPF_K, 0, libc::SECCOMP_RET_ALLOW));
    let filter = sock_fprog { len: u16::try_from(program.len()).unwrap(), filter: program.as_mut_ptr() };
    let (yes, none): (libc::c_ulong, libc::c_ulong) = (1, 0);
    // SAFETY: the call changes a property of the thread and touches no memory.
    let humble = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, yes, none, none, none) };
    assert_eq!(humble, 0, "{}", std::io::Error::last_os_error());
    let (install, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_TSYNC);
    // SAFETY: the kernel copies the program, which lives until the end of this function.
    let filtered = unsafe { libc::syscall(libc::SYS_seccomp, install, flags, &raw const filter) };
    assert_eq!(filtered, 0, "{}", std::io::Error::last_os_error());
}
