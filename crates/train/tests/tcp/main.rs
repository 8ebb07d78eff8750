//! Ranks over TCP, on this machine: they find the bits that one process finds which takes all shares itself; one that fails, dies, falls
//! silent or does not come ends all of them, by name; strangers and other jobs are left alone.

#[path = "../ranks/bits.rs"]
mod bits;
#[path = "../ranks/course.rs"]
mod course;

use std::env;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use bits::holds_the_bits_of_one;
use course::trained;
use qwenkit_train::{Error, Meeting, Ranks, Tcp, Team, Waits};

/// Limits that no rank comes near which is there.
const LONG: Waits =
    Waits { start: Duration::from_secs(100), work: Duration::from_secs(100), silence: Duration::from_secs(100) };

/// A place of its own for a job of so many ranks: rank 0's door, and what the others know of it. Of its own is the job too: a port that
/// one test has left may be another's.
fn place(count: usize) -> (TcpListener, Meeting) {
    static JOBS: AtomicUsize = AtomicUsize::new(0);
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let ports = vec![listener.local_addr().unwrap().port()];
    let job = format!("job {} of process {}", JOBS.fetch_add(1, Ordering::Relaxed), std::process::id());
    (listener, Meeting { host: "127.0.0.1".to_owned(), ports, job, count, is_wide: false })
}

/// The same call of every rank of a group, each in a thread of its own.
fn on_ranks<T: Send>(count: usize, waits: Waits, call: impl Fn(Tcp) -> T + Sync) -> Vec<T> {
    let (listener, meeting) = place(count);
    thread::scope(|scope| {
        let (call, meeting) = (&call, &meeting);
        let first = scope.spawn(move || call(Tcp::first(listener, count, &meeting.job, waits).unwrap()));
        let other = |rank: usize| scope.spawn(move || call(Tcp::other(meeting, rank, waits).unwrap()));
        let threads: Vec<_> = std::iter::once(first).chain((1..count).map(other)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn ranks_find_the_bits_of_one_process_with_as_many_shares() {
    holds_the_bits_of_one(|kind, count, folder| {
        on_ranks(count, LONG, |tcp| {
            let team = Team::new(&tcp, None).unwrap();
            let left = trained(kind, team, folder, false, 0).unwrap();
            team.end(None).unwrap();
            left
        })
    });
}

/// Messages of several frames and lengths, and sums of several parts, of which the last is not full.
#[test]
fn long_messages_and_sums_come_whole() {
    for count in [2, 3, 5] {
        on_ranks(count, LONG, |tcp| {
            assert_eq!(tcp.count(), count);
            for len in [0, 1, 1 << 20, 2_500_001] {
                let of = |rank: usize| -> Vec<u8> { (0..len / (rank + 1)).map(|i| (i * 7 + rank) as u8).collect() };
                let found = tcp.gather(&of(tcp.rank())).unwrap();
                assert!(found.len() == count && (0..count).all(|rank| found[rank] == of(rank)), "{len} bytes");
            }
            for len in [0, 1, 5, 1 << 18, 1_000_003] {
                // Numbers so different that another order of summing has other bits.
                let of = |rank: usize, i: usize| (i as f32 + 0.37).sin() * 10f32.powi(((i + 3 * rank) % 7) as i32 - 3);
                let mut numbers: Vec<f32> = (0..len).map(|i| of(tcp.rank(), i)).collect();
                let started = Instant::now();
                tcp.sum(&mut numbers).unwrap();
                let took = started.elapsed();
                let expected = |i: usize| (1..count).fold(of(0, i), |sum, rank| sum + of(rank, i));
                let wrong = (0..len).find(|&i| numbers[i].to_bits() != expected(i).to_bits());
                assert_eq!(wrong, None, "of {len} numbers");
                if tcp.rank() == 0 {
                    println!("{count} ranks: {len} numbers in {took:.1?}");
                }
            }
        });
    }
}

#[test]
fn a_rank_that_fails_says_so_to_all() {
    let found = on_ranks(3, LONG, |tcp| {
        let team = Team::new(&tcp, None).unwrap();
        team.gather(b"steps").unwrap();
        if tcp.rank() == 1 {
            return team.end(Some("the disk is full")).map_err(|error| error.to_string());
        }
        team.gather(b"more steps").map(|_| ()).map_err(|error| error.to_string())
    });
    let heard = Err("rank 1 of 3: the disk is full".to_owned());
    assert_eq!(found, [heard.clone(), Ok(()), heard]);
}

/// A rank that has gone is named to all that are left: by rank 0 as lost, by the others as rank 0 has told it.
#[test]
fn a_rank_that_is_gone_ends_all() {
    for in_sums in [false, true] {
        let found = on_ranks(3, LONG, |tcp| {
            tcp.gather(b"steps").unwrap();
            if tcp.rank() == 1 {
                return None;
            }
            Some(if in_sums { tcp.sum(&mut vec![1.0; 1_000_000]).err() } else { tcp.gather(b"more steps").err() })
        });
        assert!(
            matches!(&found[0], Some(Some(Error::Lost { what })) if what.starts_with("rank 1 is lost: its connection")),
            "{:?}",
            found[0]
        );
        assert!(
            matches!(&found[2], Some(Some(Error::OfRank { rank: 1, count: 3, what })) if what.starts_with("its connection")),
            "{:?}",
            found[2]
        );
    }
    let found = on_ranks(3, LONG, |tcp| match tcp.rank() {
        0 => None,
        _ => tcp.gather(b"steps").err().map(|error| error.to_string()),
    });
    for text in &found[1..] {
        assert!(
            text.as_ref().is_some_and(|text| text.contains("rank 0 is lost: its connection is closed")),
            "{found:?}"
        );
    }
}

/// What the child processes of the test below do; nothing where the tests are run.
#[test]
fn child() {
    let Ok(port) = env::var("QWENKIT_TEST_PORT") else { return };
    let job = env::var("QWENKIT_TEST_JOB").unwrap();
    let meeting = Meeting { ports: vec![port.parse().unwrap()], job, ..place(2).1 };
    let tcp = Tcp::other(&meeting, 1, LONG).unwrap();
    tcp.gather(b"steps").unwrap();
    match &env::var("QWENKIT_TEST_END").unwrap()[..] {
        "abort" => std::process::abort(),
        _ => panic!("something unforeseen"),
    }
}

#[test]
fn a_process_that_dies_or_panics_is_noticed_at_once() {
    for end in ["abort", "panic"] {
        let (listener, meeting) = place(2);
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["child", "--exact", "--nocapture"])
            .env("QWENKIT_TEST_PORT", meeting.ports[0].to_string())
            .env("QWENKIT_TEST_JOB", &meeting.job)
            .env("QWENKIT_TEST_END", end)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let tcp = Tcp::first(listener, 2, &meeting.job, LONG).unwrap();
        tcp.gather(b"steps").unwrap();
        let started = Instant::now();
        let error = tcp.gather(b"more steps").unwrap_err().to_string();
        assert!(error.contains("rank 1 is lost: its connection is closed") && error.contains("--resume"), "{error}");
        assert!(started.elapsed() < LONG.work / 2);
        assert!(!child.wait().unwrap().success());
    }
}

/// Busy ranks give signs of life, so that the short limit to silence does not count for them; the limit to work does.
#[test]
fn a_busy_rank_is_waited_for_and_one_that_stays_away_is_not() {
    let waits = Waits { silence: Duration::from_secs(1), ..LONG };
    let (busy, rest) = std::sync::mpsc::channel::<()>();
    let rest = std::sync::Mutex::new(rest);
    on_ranks(3, waits, |tcp| {
        if tcp.rank() == 1 {
            // More than twice as long as nothing may be heard of it; nobody sends.
            let _ = rest.lock().unwrap().recv_timeout(waits.silence * 5 / 2);
        }
        tcp.gather(b"steps").unwrap();
    });
    drop(busy);

    let waits = Waits { work: Duration::from_secs(2), ..LONG };
    let (end, ended) = std::sync::mpsc::channel::<()>();
    let ended = std::sync::Mutex::new(ended);
    let end = std::sync::Mutex::new(Some(end));
    let found = on_ranks(3, waits, |tcp| match tcp.rank() {
        1 => {
            // Away until rank 0 has given it up.
            let _ = ended.lock().unwrap().recv();
            String::new()
        }
        rank => {
            let error = tcp.gather(b"steps").unwrap_err().to_string();
            if rank == 0 {
                end.lock().unwrap().take();
            }
            error
        }
    });
    assert!(found[0].contains("rank 1 is lost: it has not come within 2 s"), "{found:?}");
    assert_eq!(found[2], "rank 1 of 3: it has not come within 2 s");
}

#[test]
fn ranks_that_come_for_different_things_end() {
    let found = on_ranks(3, LONG, |tcp| {
        let error = match tcp.rank() {
            0 => tcp.gather(b"steps").unwrap_err(),
            1 => tcp.sum(&mut [1.0]).unwrap_err(),
            _ => tcp.gather(&[]).unwrap_err(),
        };
        error.to_string()
    });
    assert!(found[0].contains("rank 1 is lost: it does something else than rank 0"), "{found:?}");
    assert!(found[1].contains("rank 0 is lost: its connection is closed"), "{found:?}");
    assert_eq!(found[2], "rank 1 of 3: it does something else than rank 0");
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let waits = Waits { start: Duration::from_millis(100), ..LONG };
    let (listener, meeting) = place(3);
    // One has come, and hears of the other.
    let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    one.write_all(&hello(1, env!("CARGO_PKG_VERSION"), &meeting.job)).unwrap();
    let error = Tcp::first(listener, 3, &meeting.job, waits).err().unwrap().to_string();
    assert!(error.starts_with("rank 2: it has not come to 127.0.0.1:") && error.contains("hint: "), "{error}");
    let mut heard = Vec::new();
    one.read_to_end(&mut heard).unwrap();
    let (heard, expected) = (String::from_utf8_lossy(&heard), "\x02\0\0\0it has not come to 127.0.0.1:");
    assert!(heard.contains(expected), "{heard:?}");
    // Nobody is there any more.
    let error = Tcp::other(&meeting, 1, waits).err().unwrap().to_string();
    assert!(error.starts_with("rank 1 has not found rank 0 within 0 s (127.0.0.1:"), "{error}");
}

/// Strangers who say something else, nothing, or half a hello hold up nobody, and are left alone.
#[test]
fn strangers_are_dropped_and_ranks_waited_for() {
    let (listener, meeting) = place(3);
    let place = listener.local_addr().unwrap();
    let connect = |bytes: &[u8]| {
        let mut stream = TcpStream::connect(place).unwrap();
        stream.write_all(bytes).unwrap();
        stream
    };
    let hello = [&b"QwenRnk1"[..], &[200, 0], b"1\n0"].concat();
    let quiet: Vec<_> = [&b""[..], b"QwenR", &hello, &hello[..9]].map(connect).into_iter().collect();
    let gone = connect(b"QwenRnk1");
    drop(gone);
    let loud: Vec<TcpStream> = [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xFF; 5000], b"QwenRnk1\xFF\xFF"].map(connect).into();
    // Those were there first.
    let (first, others) = thread::scope(|scope| {
        let (job, meeting) = (&meeting.job, &meeting);
        let first = scope.spawn(move || Tcp::first(listener, 3, job, LONG).unwrap());
        for mut stream in loud {
            assert!(!matches!(stream.read(&mut [0]), Ok(1..)), "strangers are told nothing");
        }
        let others = [2, 1].map(|rank| Tcp::other(meeting, rank, LONG).unwrap());
        (first.join().unwrap(), others)
    });
    drop(quiet);
    thread::scope(|scope| {
        let [second, one] = &others;
        let threads = [&first, one, second].map(|tcp| scope.spawn(|| tcp.gather(&[tcp.rank() as u8]).unwrap()));
        for thread in threads {
            assert_eq!(thread.join().unwrap(), [[0], [1], [2]]);
        }
    });
}

#[test]
fn another_jobs_rank_is_left_alone_and_finds_its_own() {
    let ((listener, meeting), (other_listener, other)) = (place(2), place(2));
    let other = Meeting { ports: vec![meeting.ports[0], other.ports[0]], ..other };
    thread::scope(|scope| {
        let (meeting, other) = (&meeting, &other);
        let own = scope.spawn(move || Tcp::first(listener, 2, &meeting.job, LONG).unwrap().gather(b"a").unwrap());
        // Where only the first job is, there is nothing to find.
        let astray = Meeting { ports: meeting.ports.clone(), ..other.clone() };
        let waits = Waits { start: Duration::from_millis(300), ..LONG };
        let error = Tcp::other(&astray, 1, waits).err().unwrap().to_string();
        let expected = format!("another job is there: {}; this one: {}", meeting.job, other.job);
        assert!(error.contains(&expected), "{error}");
        let job = &other.job;
        let second = scope.spawn(move || Tcp::first(other_listener, 2, job, LONG).unwrap().gather(b"c").unwrap());
        assert_eq!(Tcp::other(other, 1, LONG).unwrap().gather(b"d").unwrap(), [b"c", b"d"]);
        assert_eq!(Tcp::other(meeting, 1, LONG).unwrap().gather(b"b").unwrap(), [b"a", b"b"]);
        assert_eq!(
            (own.join().unwrap(), second.join().unwrap()),
            (vec![b"a".to_vec(), b"b".to_vec()], vec![b"c".to_vec(), b"d".to_vec()])
        );
    });
}

/// What a rank says first, written by hand.
fn hello(rank: usize, version: &str, job: &str) -> Vec<u8> {
    let text = format!("{rank}\n{version}\n{job}");
    [&b"QwenRnk1"[..], &(text.len() as u16).to_le_bytes(), text.as_bytes()].concat()
}

#[test]
fn a_rank_of_another_version_ends_all() {
    let (listener, meeting) = place(2);
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    stream.write_all(&hello(1, "0.0.0", &meeting.job)).unwrap();
    let error = Tcp::first(listener, 2, &meeting.job, LONG).err().unwrap().to_string();
    let expected = format!("it is QwenKit 0.0.0, and rank 0 is QwenKit {}", env!("CARGO_PKG_VERSION"));
    assert!(error.starts_with(&format!("rank 1: {expected}\nhint: ")), "{error}");
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).unwrap();
    assert!(heard.ends_with(format!("refused\n{expected}").as_bytes()));
}

/// Of a version that no program has, nothing is shown to anybody.
#[test]
fn a_version_that_is_none_is_refused_unsaid() {
    for version in ["\x1b[2J", &"1".repeat(33)] {
        let (listener, meeting) = place(2);
        let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        stream.write_all(&hello(1, version, &meeting.job)).unwrap();
        let error = Tcp::first(listener, 2, &meeting.job, LONG).err().unwrap().to_string();
        assert!(error.starts_with("rank 1: ") && !error.contains(version), "{error}");
        let mut heard = Vec::new();
        stream.read_to_end(&mut heard).unwrap();
        let heard = String::from_utf8_lossy(&heard);
        assert!(heard.contains("refused\n") && !heard.contains(version), "{heard:?}");
    }
}

/// As of a machine without power: its connection stays, and nothing comes.
#[test]
fn a_rank_that_falls_silent_is_given_up() {
    let (listener, meeting) = place(2);
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    stream.write_all(&hello(1, env!("CARGO_PKG_VERSION"), &meeting.job)).unwrap();
    let waits = Waits { silence: Duration::from_millis(300), ..LONG };
    let tcp = Tcp::first(listener, 2, &meeting.job, waits).unwrap();
    let error = tcp.gather(b"steps").unwrap_err().to_string();
    assert!(error.contains("rank 1 is lost: nothing was heard of it for 0 s"), "{error}");
}

/// Somebody else listens where rank 0 should be; rank 0 is at the next port.
#[test]
fn a_stranger_at_the_first_port_is_passed_by() {
    let (stranger, (listener, meeting)) = (TcpListener::bind("127.0.0.1:0").unwrap(), place(2));
    let ports = vec![stranger.local_addr().unwrap().port(), meeting.ports[0]];
    let both = Meeting { ports, ..meeting.clone() };
    thread::scope(|scope| {
        let stranger = scope.spawn(move || {
            let (mut caller, _) = stranger.accept().unwrap();
            caller.write_all(b"220 mail.example ESMTP\r\n").unwrap();
        });
        let job = &meeting.job;
        let first = scope.spawn(move || Tcp::first(listener, 2, job, LONG).unwrap().gather(b"a").unwrap());
        assert_eq!(Tcp::other(&both, 1, LONG).unwrap().gather(b"b").unwrap(), first.join().unwrap());
        stranger.join().unwrap();
    });
}

#[test]
fn ranks_of_different_runs_are_told_apart() {
    let found = on_ranks(2, LONG, |tcp| {
        let facts = format!("lr: 1\nbatch: {}", 8 + tcp.rank());
        Team::new(&tcp, None).unwrap().agree(&facts).unwrap_err().to_string()
    });
    for text in found {
        assert!(text.contains("rank 1 ") && text.contains("batch: 9; rank 0: batch: 8"), "{text}");
    }
}

#[test]
fn two_processes_of_one_rank_end_all() {
    let (listener, meeting) = place(3);
    thread::scope(|scope| {
        let (job, meeting) = (&meeting.job, &meeting);
        let first = scope.spawn(move || Tcp::first(listener, 3, job, LONG).err().unwrap().to_string());
        let one = Tcp::other(meeting, 2, LONG).unwrap();
        let error = Tcp::other(meeting, 2, LONG).err().unwrap().to_string();
        assert!(error.starts_with("rank 2 of 3: two processes are this rank"), "{error}");
        assert!(first.join().unwrap().starts_with("rank 2: two processes are this rank"));
        drop(one);
    });
}

/// One that has connected, gone, and comes again is the same.
#[test]
fn a_rank_that_is_started_again_takes_its_place() {
    let (listener, meeting) = place(3);
    thread::scope(|scope| {
        let (job, meeting) = (&meeting.job, &meeting);
        let first = scope.spawn(move || Tcp::first(listener, 3, job, LONG).unwrap().gather(b"a").unwrap());
        drop(Tcp::other(meeting, 1, LONG).unwrap());
        let one = Tcp::other(meeting, 1, LONG).unwrap();
        let one = scope.spawn(move || one.gather(b"b").unwrap());
        assert_eq!(Tcp::other(meeting, 2, LONG).unwrap().gather(b"c").unwrap().len(), 3);
        assert_eq!((first.join().unwrap().concat(), one.join().unwrap().concat()), (b"abc".to_vec(), b"abc".to_vec()));
    });
}
