//! No way out: from here on the system refuses this process, its threads and its children every outgoing connection.
//!
//! Contract: what listens and what is connected already goes on; nothing can take the lock off again. Only on Linux, by a
//! seccomp filter.

use std::{
    io,
    net::{TcpListener, TcpStream, UdpSocket},
};

/// A kind of socket that the system still knows and libraries do not name any more.
#[cfg(target_os = "linux")]
const SOCK_PACKET: i32 = 10;

/// Locks the process, before it has done anything else.
///
/// # Errors
/// When the system has no such lock.
#[cfg(target_os = "linux")]
pub(crate) fn lock() -> anyhow::Result<()> {
    use anyhow::Context as _;
    use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter_all_threads};

    let locked = || -> anyhow::Result<()> {
        let refuse = SeccompAction::Errno(libc::EPERM as u32);
        let filter = SeccompFilter::new(rules()?, SeccompAction::Allow, refuse, std::env::consts::ARCH.try_into()?)?;
        let program: BpfProgram = filter.try_into()?;
        Ok(apply_filter_all_threads(&program)?)
    };
    locked().context(
        "this system cannot lock outgoing connections (seccomp)\nhint: --offline keeps QwenKit from opening any, without the system's help",
    )
}

/// As above.
#[cfg(not(target_os = "linux"))]
pub(crate) fn lock() -> anyhow::Result<()> {
    Err(crate::failure::usage(
        "--air-gap needs Linux, whose seccomp locks outgoing connections\nhint: --offline keeps QwenKit from opening any, without the system's help",
    ))
}

/// The system calls that are refused, by what arguments; no argument means always.
#[cfg(target_os = "linux")]
fn rules() -> Result<std::collections::BTreeMap<i64, Vec<seccompiler::SeccompRule>>, seccompiler::BackendError> {
    use seccompiler::{
        SeccompCmpArgLen as Len, SeccompCmpOp as Op, SeccompCondition as Condition, SeccompRule as Rule,
    };

    let unless_one_of = |argument: u8, allowed: [i32; 2]| {
        let differs = |value: i32| Condition::new(argument, Len::Dword, Op::Ne, value as u64);
        Rule::new(vec![differs(allowed[0])?, differs(allowed[1])?])
    };
    let kinds = [libc::SOCK_DGRAM, libc::SOCK_RAW, libc::SOCK_RDM, libc::SOCK_SEQPACKET, libc::SOCK_DCCP, SOCK_PACKET];
    // The upper bits of a kind are flags.
    let is_kind = |kind: i32| Rule::new(vec![Condition::new(1, Len::Dword, Op::MaskedEq(0xf), kind as u64)?]);
    // Sockets of TCP alone, which send nothing before they are connected; those of a server are, by their clients.
    let mut sockets = vec![
        unless_one_of(0, [libc::AF_INET, libc::AF_INET6])?,
        unless_one_of(2, [libc::IPPROTO_IP, libc::IPPROTO_TCP])?,
    ];
    for kind in kinds {
        sockets.push(is_kind(kind)?);
    }
    let to_an_address = Rule::new(vec![Condition::new(4, Len::Qword, Op::Ne, 0)?])?;
    Ok([
        (libc::SYS_connect, Vec::new()),
        (libc::SYS_socket, sockets),
        (libc::SYS_sendto, vec![to_an_address]),
        // Their addresses lie behind a pointer, where a filter cannot look; nothing here uses them.
        (libc::SYS_sendmsg, Vec::new()),
        (libc::SYS_sendmmsg, Vec::new()),
        // A way to do all of these without a call.
        (libc::SYS_io_uring_setup, Vec::new()),
    ]
    .into())
}

/// Tries to go out, no further than to this machine itself. Returns what the system says.
pub(crate) fn probe() -> &'static str {
    let refused = |result: io::Result<()>| result.is_err_and(|error| error.kind() == io::ErrorKind::PermissionDenied);
    let tcp = TcpListener::bind(("127.0.0.1", 0)).and_then(|l| TcpStream::connect(l.local_addr()?)).map(drop);
    let udp = UdpSocket::bind(("127.0.0.1", 0)).and_then(|socket| socket.send_to(b"?", ("127.0.0.1", 9))).map(drop);
    match (refused(tcp), refused(udp)) {
        (true, true) => "closed: the system refuses this process outgoing connections",
        (true, false) | (false, true) => "partly closed: the system refuses some outgoing connections",
        (false, false) => {
            "open; only `pull` uses it, --offline forbids it that, and --air-gap has the system refuse it"
        }
    }
}
