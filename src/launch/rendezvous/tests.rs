use super::*;
use std::fs::File;
use std::io::{Read, Seek, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::thread;

const SECOND: Duration = Duration::from_secs(1);

/// Runs `rank` for every end of a star, each on a thread, and gives the results by rank.
fn on_all<T: Send>(star: Vec<Control>, rank: impl Fn(Control) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = star.into_iter().map(|control| scope.spawn(|| rank(control))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn meet(size: usize, make: impl Fn(usize) -> Result<Control> + Sync) -> Vec<Result<Control>> {
    thread::scope(|scope| {
        let make = &make;
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(move || make(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

fn unique_name() -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("lockstep-test-{}-{}", std::process::id(), COUNT.fetch_add(1, Relaxed))
}

/// What every star must do: gather messages of different lengths, broadcast, and pass descriptors.
fn exercise(mut control: Control) {
    let (rank, size) = (control.rank(), control.size());
    let message = |rank: usize| vec![rank as u8; 1000 * rank];
    let all = control.all_gather(&message(rank)).unwrap();
    assert!((0..size).all(|rank| all[rank] == message(rank)) && all.len() == size);
    assert_eq!(control.broadcast(format!("from {rank}").as_bytes()).unwrap(), b"from 0");

    let hosts = control.hosts().unwrap();
    assert!(hosts.len() == size && hosts.iter().all(|host| *host == hosts[0]));
    let mut mine = tempfile::tempfile().unwrap();
    write!(mine, "file of {rank}").unwrap();
    let fds = control.exchange_fds(mine.as_fd()).unwrap();
    // The offset of a passed descriptor is shared: one reader at a time.
    for reader in 0..size {
        if reader == rank {
            for (owner, fd) in fds.iter().enumerate() {
                let mut text = String::new();
                let mut file = File::from(fd.try_clone().unwrap());
                file.rewind().unwrap();
                file.read_to_string(&mut text).unwrap();
                assert_eq!(text, format!("file of {owner}"));
            }
        }
        control.all_gather(&[]).unwrap();
    }
}

#[test]
fn stars_of_pairs_gather_broadcast_and_pass_descriptors() {
    for size in [1, 2, 3, 8] {
        on_all(Control::local(size).unwrap(), exercise);
    }
}

#[test]
fn stars_over_tcp_and_abstract_sockets_do_the_same_and_can_be_made_twice_at_one_place() {
    let port = free_port();
    let name = unique_name();
    for size in [1, 2, 5] {
        let made = meet(size, |rank| {
            let tcp = |_| Control::tcp(rank, size, "127.0.0.1", port, 20 * SECOND);
            let unix = |_| Control::abstract_unix(rank, size, &name, 20 * SECOND);
            Ok([tcp(0)?, tcp(1)?, unix(0)?, unix(1)?])
                .map(|stars| stars.into_iter().for_each(exercise))
                .map(|()| Control::new(0, 1, Vec::new(), SECOND))
        });
        made.into_iter().for_each(|result| drop(result.unwrap()));
    }
}

#[test]
fn a_rank_that_does_not_come_is_named_to_those_who_came() {
    let name = unique_name();
    let results = meet(3, |rank| match rank {
        1 => Ok(Control::new(0, 1, Vec::new(), SECOND)),
        _ => Control::abstract_unix(rank, 3, &name, SECOND),
    });
    for rank in [0, 2] {
        let error = results[rank].as_ref().unwrap_err();
        assert_eq!(error.kind(), Kind::PeerLost);
        assert!(error.to_string().contains("ranks [1] of 3 did not come"), "{error}");
    }
}

#[test]
fn two_processes_with_one_rank_and_different_worlds_are_told_so() {
    for (second, expected) in [((1, 3), "came twice"), ((2, 4), "was told of 4 ranks, rank 0 of 3")] {
        let name = unique_name();
        let results = meet(3, |index| {
            let (rank, size) = [(0, 3), (1, 3), second][index];
            Control::abstract_unix(rank, size, &name, 20 * SECOND)
        });
        let error = results[0].as_ref().unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        assert!(error.to_string().contains(expected), "{error}");
        assert!(results[2].as_ref().unwrap_err().to_string().contains(expected) || second.0 == 1);
    }
}

#[test]
fn strangers_at_the_port_neither_enter_nor_disturb() {
    let port = free_port();
    let results = meet(2, |rank| {
        if rank == 1 {
            let stranger = |bytes: &[u8]| loop {
                if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
                    return stream.write_all(bytes).map(|()| stream).unwrap();
                }
            };
            drop(stranger(b""));
            drop(stranger(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"));
        }
        Control::tcp(rank, 2, "127.0.0.1", port, 20 * SECOND)
    });
    on_all(results.into_iter().map(Result::unwrap).collect(), exercise);
}

#[test]
fn a_rank_that_dies_or_is_silent_is_named_by_all() {
    for silent in [false, true] {
        let results = on_all(Control::local(3).unwrap(), |mut control| {
            control.set_timeout(if silent { SECOND / 10 } else { 20 * SECOND });
            if control.rank() == 2 {
                thread::sleep(if silent { SECOND } else { Duration::ZERO });
                return None;
            }
            Some(control.all_gather(b"here").unwrap_err())
        });
        for error in results.into_iter().flatten() {
            assert_eq!(error.kind(), Kind::PeerLost);
            assert!(error.to_string().contains("rank 2"), "{error}");
        }
    }
}
