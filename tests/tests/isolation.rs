//! A guest reaches no host, no metadata service, no other guest and no private network: counted where the packets would arrive.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use whole_machine::platform::Platform;

/// Counts connections to an address in a network namespace, on a thread of its own that has entered it.
fn counter(netns: Option<&str>, address: SocketAddr) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let (seen, ready) = (count.clone(), std::sync::mpsc::channel());
    let netns = netns.map(|name| std::fs::File::open(format!("/run/netns/{name}")).expect("the namespace is there"));
    std::thread::spawn(move || {
        if let Some(netns) = netns {
            nix::sched::setns(netns, nix::sched::CloneFlags::CLONE_NEWNET).expect("entering the namespace");
        }
        let listener = TcpListener::bind(address).unwrap_or_else(|e| panic!("{address}: {e}"));
        ready.0.send(listener.local_addr().expect("bound").port()).expect("somebody waits");
        for connection in listener.incoming() {
            drop(connection);
            seen.fetch_add(1, Ordering::SeqCst);
        }
    });
    ready.1.recv_timeout(Duration::from_secs(5)).expect("the listener is up");
    count
}

fn ip(args: &[&str]) -> String {
    let output = Command::new("ip").args(args).output().expect("ip");
    assert!(output.status.success(), "ip {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_reaches_nothing_that_it_should_not() {
    let platform = Platform::start();
    let (attacker, neighbour) = (platform.create().await, platform.create().await);
    let outer = format!("wrn-{}", platform.tag());

    // The neighbour listens, and counts by itself.
    let listener = "import socket,threading\ns=socket.socket()\ns.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1)\ns.bind(('0.0.0.0',8080))\ns.listen()\n\
                    open('/tmp/ready','w').write('x')\nn=0\nwhile True:\n c,_=s.accept();n+=1;open('/tmp/count','w').write(str(n));c.close()\n";
    let start = format!(
        "echo 0 > /tmp/count; cat > /root/l.py <<'X'\n{listener}X\nsetsid python3 /root/l.py >/dev/null 2>&1 & while [ ! -e /tmp/ready ]; do sleep 0.1; done"
    );
    assert_eq!(platform.shell(&neighbour, &start).await.0, 0);

    // The metadata service and a private address, owned by the namespace that every packet of a guest passes through.
    for address in ["169.254.169.254", "192.168.77.7", "100.64.7.7"] {
        ip(&["-n", &outer, "addr", "add", &format!("{address}/32"), "dev", "lo"]);
    }
    let everywhere = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8088));
    let in_outer = counter(Some(&outer), everywhere);
    let on_host = counter(None, everywhere);

    // Addresses of the host: the uplink's end, and every other one it has.
    let host: Vec<String> = ip(&["-4", "-o", "addr"])
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3)?.split('/').next().map(str::to_owned))
        .filter(|address| address != "127.0.0.1")
        .collect();
    let outer_addresses: Vec<String> = ip(&["-n", &outer, "-4", "-o", "addr"])
        .lines()
        .filter_map(|line| line.split_whitespace().nth(3)?.split('/').next().map(str::to_owned))
        .filter(|address| address != "127.0.0.1")
        .collect();
    let routes = ip(&["-n", &outer, "-4", "route"]);
    let guests: Vec<String> = routes
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|a| a.starts_with("10.11."))
        .map(str::to_owned)
        .collect();
    assert!(!host.is_empty() && guests.len() >= 2, "{host:?} {guests:?}");

    let probe = "import socket,sys\nfor t in sys.argv[1:]:\n h,p=t.rsplit(':',1)\n s=socket.socket();s.settimeout(0.4)\n try:\n  s.connect((h,int(p)));print('REACHED',t)\n except OSError: pass\n s.close()\nprint('done')\n";
    let targets: Vec<String> = host
        .iter()
        .chain(&outer_addresses)
        .map(|address| format!("{address}:8088"))
        .chain(guests.iter().flat_map(|address| [format!("{address}:8080"), format!("{address}:49983")]))
        .chain(["169.254.0.22:8088", "169.254.0.22:22"].map(str::to_owned))
        .collect();
    let script = format!("cat > /root/p.py <<'X'\n{probe}X\npython3 /root/p.py {}", targets.join(" "));
    let (code, said) = platform.shell(&attacker, &script).await;
    assert_eq!((code, said.as_str()), (0, "done\n"), "targets: {targets:?}");

    assert_eq!(in_outer.load(Ordering::SeqCst), 0, "packets arrived in the agent's own namespace");
    assert_eq!(on_host.load(Ordering::SeqCst), 0, "packets arrived at the host");
    assert_eq!(
        platform.shell(&neighbour, "cat /tmp/count").await,
        (0, "0\n".to_owned()),
        "packets arrived at the neighbour"
    );

    // The counters do count: the same listeners hear a connection that is allowed to be made.
    assert!(std::net::TcpStream::connect(("127.0.0.1", 8088)).is_ok());
    whole_machine::wait::until("the host's counter", Duration::from_secs(5), || async {
        (on_host.load(Ordering::SeqCst) == 1).then_some(())
    })
    .await;
    let (_, said) = platform
        .shell(
            &neighbour,
            "python3 -c \"import socket;socket.create_connection(('169.254.0.21',8080))\"; sleep 0.3; cat /tmp/count",
        )
        .await;
    assert_eq!(said.trim(), "1");

    // A forged sender changes nothing, and IPv6 is closed.
    let (_, said) =
        platform.shell(&attacker, "ip -6 route show default; cat /proc/net/if_inet6 | grep -v ' lo$' | wc -l").await;
    assert!(!said.contains("default"), "{said}");
    assert_eq!(platform.finish(), Default::default());
}
