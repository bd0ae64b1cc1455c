//! The services: how each is run and asked, and what is done to it.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context as _, Result, ensure};
use bro_tests::host::Manager;
use bro_tests::host::site::{PATIENCE, Site, ask};
use bro_tests::process::eventually;
use bro_tests::tier::Need;

use super::{CLIENT, name_servers};

/// What services run, by the name that it has in their containers below /services.
pub(super) const FILES: &[(&str, &str)] = &[
    ("Caddyfile", include_str!("../../../services/whom/Caddyfile")),
    ("apache.conf", include_str!("../../../services/whom/apache.conf")),
    ("dovecot.conf", include_str!("../../../services/whom/dovecot.conf")),
    ("haproxy.cfg", include_str!("../../../services/whom/haproxy.cfg")),
    ("knot.conf", include_str!("../../../services/whom/knot.conf")),
    ("lighttpd.conf", include_str!("../../../services/whom/lighttpd.conf")),
    ("named.conf", include_str!("../../../services/whom/named.conf")),
    ("nginx.conf", include_str!("../../../services/whom/nginx.conf")),
    ("prometheus.yml", include_str!("../../../services/whom/prometheus.yml")),
    ("tomcat/META-INF/context.xml", include_str!("../../../services/whom/tomcat/META-INF/context.xml")),
    ("tomcat/WEB-INF/rewrite.config", include_str!("../../../services/whom/tomcat/WEB-INF/rewrite.config")),
    ("unbound.conf", include_str!("../../../services/whom/unbound.conf")),
    ("vsftpd.conf", include_str!("../../../services/whom/vsftpd.conf")),
    ("whom.js", include_str!("../../../services/whom/whom.js")),
    ("whom.sql", "create user if not exists whom;\n"),
    ("whom.py", include_str!("../../../services/whom/whom.py")),
    ("whom.shtml", "<!--#echo var=\"REMOTE_ADDR\" -->\n"),
    ("whom.zone", include_str!("../../../services/whom/whom.zone")),
];

/// What is built once for all managers, and in their containers below /built.
pub(super) const SOURCES: &[(&str, &str)] = &[
    ("Whom.java", include_str!("../../../services/whom/Whom.java")),
    ("whom.go", include_str!("../../../services/whom/whom.go")),
];

/// Where a service listens inside.
#[derive(Debug, Clone, Copy)]
pub(super) enum Inside {
    Port(u16),
    /// At this one, `{port}` in its lines, by whose number it tells its own clients from others (getsockname(2)): a fence of the system's tells it
    /// that. A user's service has to have the very port that its clients come to.
    Compared(u16),
}

/// Where its clients come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outside {
    V4,
    /// The same of IPv6 and IPv4.
    Dual,
    /// And a unix socket, for this one of the service's.
    Unix(&'static str),
    /// Over UDP too.
    Datagrams,
}

impl Outside {
    /// How many of systemd's sockets the service takes.
    pub(super) const fn sockets(self) -> usize {
        match self {
            Self::V4 | Self::Dual => 1,
            Self::Unix(_) | Self::Datagrams => 2,
        }
    }
}

/// A service as it is, in a container.
pub(super) struct Service {
    /// The host masks the services that it has itself.
    pub(super) name: &'static str,
    pub(super) needs: &'static [Need],
    /// `[Container]` lines.
    pub(super) lines: &'static str,
    pub(super) inside: Inside,
    pub(super) outside: Outside,
    /// Asks it as a client does; what it says, in its answer or its log, of where the client comes from.
    pub(super) ask: fn(&Site<'_>) -> Result<String>,
    /// What is done to it while it is awake.
    pub(super) awake: fn(&Site<'_>) -> Result<()>,
}

pub(super) const SERVICES: &[Service] = &[
    Service {
        name: "whom-tomcat",
        needs: &[
            Need::Program("java", "default-jdk-headless"),
            Need::File("/usr/share/tomcat10/bin/catalina.sh", "tomcat10"),
        ],
        lines: "Environment=CATALINA_BASE=/tmp/tomcat \"JAVA_OPTS=-Xmx64m -XX:+UseSerialGC -XX:TieredStopAtLevel=1\"\n\
                Exec=sh -c \"cd /tmp; mkdir -p tomcat/webapps tomcat/temp; cp -r /usr/share/tomcat10/etc tomcat/conf; \
                cp -r /services/tomcat tomcat/webapps/ROOT; exec sh /usr/share/tomcat10/bin/catalina.sh run\"",
        inside: Inside::Port(8080),
        outside: Outside::Dual,
        ask: http,
        awake: nothing,
    },
    Service {
        name: "whom-jetty",
        needs: &[
            Need::Program("java", "default-jdk-headless"),
            Need::File("/usr/share/jetty9/start.jar", "jetty9"),
        ],
        lines: "Volume={files}/log:/log\n\
                Exec=sh -c \"mkdir -p /tmp/jetty/webapps /tmp/jetty/lib/ext /tmp/jetty/resources; cd /tmp/jetty; ln -s /log logs; \
                cp /usr/share/jetty9/start.ini .; cp -r /usr/share/jetty9/default-root webapps/root; \
                exec /usr/bin/java -Xmx64m -XX:+UseSerialGC -XX:TieredStopAtLevel=1 -Djetty.home=/usr/share/jetty9 \
                -jar /usr/share/jetty9/start.jar --module=customrequestlog jetty.requestlog.filePath=logs/jetty\"",
        inside: Inside::Port(8080),
        outside: Outside::Dual,
        ask: jetty,
        awake: nothing,
    },
    Service {
        name: "whom-java-httpserver",
        needs: &[
            Need::Program("java", "default-jdk-headless"),
            Need::Program("javac", "default-jdk-headless"),
        ],
        lines: "Exec=/usr/bin/java -XX:TieredStopAtLevel=1 -cp /built Whom httpserver 80",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: nothing,
    },
    Service {
        name: "whom-java-nio",
        needs: &[
            Need::Program("java", "default-jdk-headless"),
            Need::Program("javac", "default-jdk-headless"),
        ],
        lines: "Exec=/usr/bin/java -XX:TieredStopAtLevel=1 -cp /built Whom nio 80",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: nothing,
    },
    Service {
        name: "whom-mariadb",
        needs: &[
            Need::Program("mariadbd", "mariadb-server-core"),
            Need::Program("mariadb-install-db", "mariadb-server-core"),
            Need::Program("mariadb", "mariadb-client-core"),
        ],
        lines: "User=daemon\nVolume={name}:/data:U\nExec=sh -c \"test -d /data/mysql || \
                mariadb-install-db --no-defaults --datadir=/data --skip-test-db >/dev/null; \
                exec mariadbd --no-defaults --datadir=/data --socket=/tmp/s --pid-file=/tmp/p --skip-name-resolve \
                --init-file=/services/whom.sql\"",
        inside: Inside::Port(3306),
        outside: Outside::V4,
        ask: mariadb,
        awake: nothing,
    },
    Service {
        name: "whom-postgresql",
        needs: &[
            Need::Program("initdb", "postgresql"),
            Need::Program("psql", "postgresql-client"),
            Need::Program("pgbench", "postgresql"),
        ],
        lines: "User=postgres\nVolume={name}:/data:U\nExec=sh -c \"cd /usr/lib/postgresql/*/bin; test -s /data/pg/PG_VERSION || \
                { ./initdb --pgdata /data/pg --auth trust --no-sync >/dev/null; echo host all all all trust >>/data/pg/pg_hba.conf; }; \
                exec ./postgres -D /data/pg -c unix_socket_directories=/tmp -c listen_addresses=0.0.0.0\"",
        inside: Inside::Port(5432),
        outside: Outside::Unix("/tmp/.s.PGSQL.5432"),
        ask: postgresql,
        awake: |site| {
            pgbench(site)?;
            by_other_ways(site)
        },
    },
    Service {
        name: "whom-nginx",
        needs: &[
            Need::Program("nginx", "nginx-light"),
            Need::Program("wrk", "wrk"),
            Need::Program("pgrep", "procps"),
        ],
        lines: "Exec=nginx -c /services/nginx.conf -g \"daemon off;\"\nStopSignal=SIGQUIT",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: |site| {
            wrk(site)?;
            renewed(site, "HUP")
        },
    },
    Service {
        name: "whom-nginx-upgrade",
        needs: &[Need::Program("nginx", "nginx-light")],
        lines: "Exec=sh -c \"/usr/sbin/nginx -c /services/nginx.conf; trap 'kill -QUIT $$(cat /tmp/nginx.pid); exit 0' TERM; \
                sleep infinity & wait\"",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: nginx_upgrade,
    },
    Service {
        name: "whom-haproxy",
        needs: &[Need::Program("haproxy", "haproxy"), Need::Program("pgrep", "procps")],
        lines: "Exec=haproxy -W -db -f /services/haproxy.cfg\nStopSignal=SIGUSR1",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: |site| renewed(site, "USR2"),
    },
    Service {
        name: "whom-caddy",
        needs: &[Need::Program("caddy", "caddy")],
        lines: "Environment=HOME=/tmp\nExec=caddy run --config /services/Caddyfile --adapter caddyfile",
        inside: Inside::Port(80),
        outside: Outside::Dual,
        ask: http,
        awake: |site| {
            inside(site, "caddy reload --force --config /services/Caddyfile --adapter caddyfile 2>&1")?;
            Ok(())
        },
    },
    Service {
        name: "whom-lighttpd",
        needs: &[Need::Program("lighttpd", "lighttpd")],
        lines: "Exec=lighttpd -D -f /services/lighttpd.conf\nStopSignal=SIGINT",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: |site| signal(site, "USR1"),
    },
    Service {
        name: "whom-go",
        needs: &[Need::Program("go", "golang-go")],
        lines: "Exec=/built/whom 80",
        inside: Inside::Port(80),
        outside: Outside::Dual,
        ask: http,
        awake: nothing,
    },
    Service {
        name: "whom-vsftpd",
        needs: &[Need::Program("vsftpd", "vsftpd")],
        lines: "Exec=sh -c \"mkdir -p /srv/ftp; exec vsftpd /services/vsftpd.conf\"\nStopSignal=SIGKILL",
        inside: Inside::Port(21),
        outside: Outside::V4,
        ask: ftp,
        awake: |site| signal(site, "HUP"),
    },
    Service {
        name: "whom-dovecot",
        needs: &[Need::Program("dovecot", "dovecot-imapd")],
        lines: "Volume={files}/log:/log\nExec=dovecot -F -c /services/dovecot.conf",
        inside: Inside::Port(143),
        outside: Outside::V4,
        ask: imap,
        awake: |site| signal(site, "HUP"),
    },
    Service {
        name: "whom-apache",
        needs: &[Need::Program("apache2", "apache2-bin"), Need::Program("pgrep", "procps")],
        lines: "Exec=apache2 -DFOREGROUND -f /services/apache.conf\nStopSignal=SIGWINCH",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: |site| renewed(site, "USR1"),
    },
    Service {
        name: "whom-gunicorn",
        needs: &[Need::Program("gunicorn", "gunicorn"), Need::Program("pgrep", "procps")],
        lines: "Exec=/usr/bin/python3 -m gunicorn --chdir /services -w 3 -b 0.0.0.0:80 whom",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: |site| renewed(site, "HUP"),
    },
    Service {
        name: "whom-uvicorn",
        needs: &[Need::Program("uvicorn", "uvicorn")],
        lines: "Exec=/usr/bin/python3 -m uvicorn --app-dir /services --host 0.0.0.0 --port 80 --workers 2 --loop asyncio whom:asgi",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: nothing,
    },
    Service {
        name: "whom-uvloop",
        needs: &[
            Need::Program("uvicorn", "uvicorn"),
            Need::File("/usr/lib/python3/dist-packages/uvloop/__init__.py", "python3-uvloop"),
        ],
        lines: "Exec=/usr/bin/python3 -m uvicorn --app-dir /services --host 0.0.0.0 --port 80 --loop uvloop whom:asgi",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: nothing,
    },
    Service {
        name: "whom-asyncio",
        needs: &[Need::Program("python3", "python3")],
        lines: "Exec=sh -c \"trap 'exit 0' TERM; while :; do /usr/bin/python3 /services/whom.py 80 & wait; done\"",
        inside: Inside::Port(80),
        outside: Outside::V4,
        ask: http,
        awake: supervised,
    },
    Service {
        name: "whom-node",
        needs: &[Need::Program("node", "nodejs")],
        lines: "Exec=/usr/bin/node /services/whom.js 80\nStopSignal=SIGKILL",
        inside: Inside::Port(80),
        outside: Outside::Dual,
        ask: http,
        awake: |site| {
            let answer = ask(
                site.host.connect_to(format!("[::1]:{}", site.port).parse()?)?,
                b"GET / HTTP/1.0\r\n\r\n",
            )?;
            ensure!(answer.ends_with(b"::1\n"), "{}", String::from_utf8_lossy(&answer));
            Ok(())
        },
    },
    Service {
        name: "whom-node-cluster",
        needs: &[Need::Program("node", "nodejs")],
        lines: "Exec=/usr/bin/node /services/whom.js {port} 2\nStopSignal=SIGKILL",
        inside: Inside::Compared(80),
        outside: Outside::V4,
        ask: http,
        awake: nothing,
    },
    Service {
        name: "whom-prometheus",
        needs: &[Need::Program("prometheus", "prometheus")],
        lines: "Volume={files}/log:/log\nExec=prometheus --config.file=/services/prometheus.yml --storage.tsdb.path=/tmp/data",
        inside: Inside::Port(9090),
        outside: Outside::V4,
        ask: prometheus,
        awake: |site| signal(site, "HUP"),
    },
    Service {
        name: "whom-sshd",
        needs: &[Need::Program("sshd", "openssh-server"), Need::Program("ssh", "openssh-client")],
        lines: "Exec=sh -c \"mkdir -p /run/sshd; echo root:*::::::: >/etc/shadow; \
                ssh-keygen -q -t ed25519 -N '' -f /tmp/host; \
                exec /usr/sbin/sshd -D -e -o HostKey=/tmp/host -o StrictModes=no -o AuthorizedKeysFile=/services/key.pub -o PidFile=/tmp/sshd.pid -f /dev/null\"",
        inside: Inside::Port(22),
        outside: Outside::V4,
        ask: ssh,
        awake: |site| signal(site, "HUP"),
    },
    Service {
        name: "whom-memcached",
        needs: &[Need::Program("memcached", "memcached")],
        lines: "Exec=memcached -u root -l 0.0.0.0 -U 0",
        inside: Inside::Port(11211),
        outside: Outside::V4,
        ask: |site| talk(site, b"stats conns\r\n", "END\r\n"),
        awake: nothing,
    },
    Service {
        name: "whom-redis",
        needs: &[
            Need::Program("redis-server", "redis-server"),
            Need::Program("redis-benchmark", "redis-tools"),
        ],
        lines: "Exec=redis-server --protected-mode no --save \"\" --dir /tmp",
        inside: Inside::Port(6379),
        outside: Outside::V4,
        ask: |site| talk(site, b"CLIENT LIST\r\nQUIT\r\n", "+OK\r\n"),
        awake: redis_benchmark,
    },
    Service {
        name: "whom-mosquitto",
        needs: &[Need::Program("mosquitto", "mosquitto")],
        lines: "Volume={files}/log:/log\nExec=sh -c \"printf 'listener 1883\\nallow_anonymous true\\nuser root\\nlog_dest file /log/mosquitto\\n' >/tmp/c; exec mosquitto -c /tmp/c\"",
        inside: Inside::Port(1883),
        outside: Outside::V4,
        ask: mosquitto,
        awake: |site| signal(site, "HUP"),
    },
    Service {
        name: "whom-dnsmasq",
        needs: &[Need::Program("dnsmasq", "dnsmasq-base")],
        lines: "Volume={files}/log:/log\nExec=dnsmasq -k -u root -C /dev/null --no-resolv --no-hosts --port={port} --pid-file=/tmp/p \
                --address=/whom.test/192.0.2.9 --log-facility=/log/dnsmasq --log-queries=extra",
        inside: Inside::Compared(53),
        outside: Outside::V4,
        ask: name_servers::dnsmasq,
        awake: nothing,
    },
    Service {
        name: "whom-knot",
        needs: &[Need::Program("knotd", "knot")],
        lines: "Exec=sh -c \"mkdir /tmp/knot; exec knotd -c /services/knot.conf\"",
        inside: Inside::Port(53),
        outside: Outside::Datagrams,
        ask: name_servers::answering,
        awake: |site| {
            let _awake = name_servers::from_inside(site)?;
            signal(site, "HUP")
        },
    },
    Service {
        name: "whom-unbound",
        needs: &[Need::Program("unbound", "unbound")],
        lines: "Volume={files}/log:/log\nExec=unbound -c /services/unbound.conf",
        inside: Inside::Port(53),
        outside: Outside::Datagrams,
        ask: |site| name_servers::logging(site, "unbound"),
        awake: |site| {
            let _awake = name_servers::from_inside(site)?;
            signal(site, "HUP")
        },
    },
    Service {
        name: "whom-named",
        needs: &[Need::Program("named", "bind9")],
        lines: "Volume={files}/log:/log\nExec=named -f -c /services/named.conf",
        inside: Inside::Port(53),
        outside: Outside::Datagrams,
        ask: |site| name_servers::logging(site, "named"),
        awake: |site| {
            let _awake = name_servers::from_inside(site)?;
            signal(site, "HUP")
        },
    },
];

/// A connected client that comes from [`CLIENT`].
pub(super) fn connect(site: &Site<'_>) -> Result<TcpStream> {
    site.host.connect_to(format!("{CLIENT}:{}", site.port).parse()?)
}

/// Says `question`; what comes back, up to `end` or the end.
pub(super) fn talk(site: &Site<'_>, question: &[u8], end: &str) -> Result<String> {
    continued(&mut connect(site)?, question, end)
}

/// The same over a connection that stays.
fn continued(client: &mut TcpStream, question: &[u8], end: &str) -> Result<String> {
    client.write_all(question)?;
    let (mut answer, mut piece) = (Vec::new(), [0; 4096]);
    loop {
        let text = String::from_utf8_lossy(&answer);
        if !end.is_empty() && text.ends_with(end) {
            return Ok(text.into_owned());
        }
        match client.read(&mut piece).with_context(|| format!("after {text:?}"))? {
            0 => return Ok(text.into_owned()),
            length => answer.extend_from_slice(&piece[..length]),
        }
    }
}

pub(super) fn http(site: &Site<'_>) -> Result<String> {
    talk(site, b"GET / HTTP/1.0\r\nHost: whom\r\n\r\n", "")
}

/// A line that it has logged, with the client's address.
pub(super) fn logged(read: impl Fn() -> String, what: &str) -> Result<String> {
    let mut found = String::new();
    let there = eventually(PATIENCE, || {
        let log = read();
        let line = log.lines().rev().find(|line| line.contains(what) && line.contains(CLIENT));
        line.unwrap_or_default().clone_into(&mut found);
        !found.is_empty()
    });
    ensure!(there, "no line with {what} and {CLIENT} in its log: {}", read());
    Ok(found)
}

/// What it has written into a file of the folder that it has for that.
pub(super) fn log_file(site: &Site<'_>, name: &str) -> String {
    let path = site.host.path(&format!("{}/log/{name}", services(site.manager)));
    std::fs::read_to_string(path).unwrap_or_default()
}

fn mariadb(site: &Site<'_>) -> Result<String> {
    let port = site.port.to_string();
    let query = "--execute=select user()";
    site.host.client_program(&["mariadb", "--no-defaults", "-h", CLIENT, "-P", &port, "-u", "whom", query])
}

fn postgresql(site: &Site<'_>) -> Result<String> {
    let port = site.port.to_string();
    let query = "select inet_client_addr()";
    let psql = ["psql", "--no-psqlrc", "-At", "-h", CLIENT, "-p", &port, "-U", "postgres", "-c", query];
    // It listens before it is ready, and until it has ended, and says so.
    let mut said = site.host.client_program(&psql);
    let not_now = |said: &Result<String>| {
        let error = said.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
        error.contains("is starting up") || error.contains("is shutting down")
    };
    ensure!(
        eventually(PATIENCE, || {
            if not_now(&said) {
                said = site.host.client_program(&psql);
            }
            !not_now(&said)
        }),
        "{said:?}"
    );
    said
}

/// The client is in a query's log line, but the log is of queries alone.
fn prometheus(site: &Site<'_>) -> Result<String> {
    let ask = || talk(site, b"GET /api/v1/query?query=1 HTTP/1.0\r\n\r\n", "");
    // It listens before it is ready, and says so.
    ensure!(eventually(PATIENCE, || ask().is_ok_and(|answer| answer.contains(" 200 OK"))), "{:?}", ask());
    logged(|| log_file(site, "queries"), "clientIP")
}

fn ssh(site: &Site<'_>) -> Result<String> {
    let key = site.host.path(&format!("{}/key", services(site.manager)));
    let (port, key) = (site.port.to_string(), key.display().to_string());
    let options = ["-F", "none", "-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"];
    let login = ["-o", "BatchMode=yes", "-i", &key, "-p", &port, "-l", "root", CLIENT, "echo $SSH_CLIENT"];
    site.host.client_program(&[&["ssh"], &options[..], &login[..]].concat())
}

fn ftp(site: &Site<'_>) -> Result<String> {
    let mut client = connect(site)?;
    let welcome = continued(&mut client, b"", "\r\n")?;
    let login = continued(&mut client, b"USER ftp\r\n", "\r\n")?;
    ensure!(welcome.starts_with("220 ") && login.starts_with("230 "), "{welcome}{login}");
    continued(&mut client, b"STAT\r\n", "211 End of status\r\n")
}

/// The log says from where a user has logged in.
fn imap(site: &Site<'_>) -> Result<String> {
    let mut client = connect(site)?;
    let mut lines = BufReader::new(client.try_clone()?).lines();
    for (question, answer) in
        [("", "* OK [CAPABILITY"), ("a LOGIN whom whom\r\n", "a OK"), ("b LOGOUT\r\n", "b OK")]
    {
        client.write_all(question.as_bytes())?;
        // Before it can be asked it may say that it waits for its other processes.
        let said = lines.by_ref().map_while(Result::ok).find(|line| line.starts_with(answer));
        ensure!(said.is_some(), "no “{answer}” to “{question}”");
    }
    logged(|| log_file(site, "dovecot"), "imap-login: Info: Login: user=<whom>")
}

fn mosquitto(site: &Site<'_>) -> Result<String> {
    // CONNECT of MQTT 3.1.1 without a name; its answer is CONNACK.
    let answer = talk(site, b"\x10\x0c\x00\x04MQTT\x04\x02\x00\x3c\x00\x00", "\0\0")?;
    ensure!(answer == " \u{2}\0\0", "{answer:?}");
    logged(|| log_file(site, "mosquitto"), "New connection from")
}

/// Of a page that was not asked for before, so that no line of before tells of it.
fn jetty(site: &Site<'_>) -> Result<String> {
    static ASKED: AtomicU32 = AtomicU32::new(0);
    let page = format!("GET /{} HTTP/1.0", ASKED.fetch_add(1, Ordering::Relaxed));
    let answer = talk(site, format!("{page}\r\n\r\n").as_bytes(), "")?;
    ensure!(answer.contains(" 404 "), "{answer}");
    logged(|| log_file(site, "jetty"), &page)
}

fn nothing(_: &Site<'_>) -> Result<()> {
    Ok(())
}

/// To its first process.
fn signal(site: &Site<'_>, name: &str) -> Result<()> {
    site.manager.run(site.host, &["podman", "kill", "--signal", name, &format!("systemd-{}", site.name)])?;
    Ok(())
}

/// The same, and those that were its children then have made room for others.
fn renewed(site: &Site<'_>, name: &str) -> Result<()> {
    let script = format!(
        "old=$(pgrep -P 1); kill -{name} 1; for pid in $old; do while kill -0 $pid; do sleep 0.05; done; done 2>/dev/null"
    );
    inside(site, &script)?;
    Ok(())
}

pub(super) fn inside(site: &Site<'_>, script: &str) -> Result<String> {
    let name = format!("systemd-{}", site.name);
    site.manager.run(site.host, &["podman", "exec", &name, "sh", "-euc", script])
}

/// The documentation's own way to put another program into a running nginx.
fn nginx_upgrade(site: &Site<'_>) -> Result<()> {
    inside(
        site,
        "old=$(cat /tmp/nginx.pid); kill -USR2 $old; until test -s /tmp/nginx.pid.oldbin -a -s /tmp/nginx.pid; do sleep 0.05; done; \
         kill -QUIT $old; while kill -0 $old 2>/dev/null; do sleep 0.05; done; kill -0 $(cat /tmp/nginx.pid)",
    )?;
    Ok(())
}

/// The process ends and its supervisor starts another one: clients meanwhile wait.
fn supervised(site: &Site<'_>) -> Result<()> {
    for _ in 0..3 {
        let ended = talk(site, b"GET /end HTTP/1.0\r\n\r\n", "");
        ensure!(ended.as_ref().map_or(true, String::is_empty), "{ended:?}");
        let answer = http(site)?;
        ensure!(answer.contains(CLIENT), "{answer}");
    }
    Ok(())
}

fn wrk(site: &Site<'_>) -> Result<()> {
    let url = format!("http://{CLIENT}:{}/", site.port);
    let report = site.host.client_program(&["wrk", "-t", "1", "-c", "16", "-d", "1s", &url])?;
    ensure!(!report.contains("Socket errors") && !report.contains("Non-2xx"), "{report}");
    Ok(())
}

fn redis_benchmark(site: &Site<'_>) -> Result<()> {
    let port = site.port.to_string();
    let args = ["redis-benchmark", "-h", CLIENT, "-p", &port, "-q", "-n", "5000", "-P", "8", "-t", "set,get"];
    let report = site.host.client_program(&args)?;
    ensure!(!report.contains("rror"), "{report}");
    Ok(())
}

fn pgbench(site: &Site<'_>) -> Result<()> {
    let port = site.port.to_string();
    let bench = |args: &[&str]| {
        let whom = ["pgbench", "-h", CLIENT, "-p", &port, "-U", "postgres"];
        site.host.client_program(&[&whom, args, &["postgres"]].concat())
    };
    bench(&["--initialize", "--scale", "1", "--quiet"])?;
    for how in [
        &["--client", "4", "--transactions", "100"][..],
        &["--connect", "--select-only", "--transactions", "50"],
    ] {
        let report = bench(how)?;
        ensure!(report.contains("number of failed transactions: 0 "), "{report}");
    }
    Ok(())
}

/// Over the unix socket, which is adopted too, and from inside, where both are where they were.
fn by_other_ways(site: &Site<'_>) -> Result<()> {
    let query = "select inet_client_addr()";
    // Those inside keep nothing awake, and podman may take as long as the idle time.
    let _stays = connect(site)?;
    let folder = site.host.path(&format!("{}/log", services(site.manager))).display().to_string();
    let unix = ["psql", "--no-psqlrc", "-At", "-h", &folder, "-U", "postgres", "-c", query];
    ensure!(site.host.client_program(&unix)?.is_empty(), "it sees another client than one of a unix socket");
    for (host, address) in [("/tmp", ""), ("127.0.0.1", "127.0.0.1")] {
        let seen =
            inside(site, &format!("/usr/bin/psql --no-psqlrc -At -h {host} -U postgres -c '{query}'"))?;
        ensure!(seen.starts_with(address) && seen.is_empty() == address.is_empty(), "by {host}: {seen}");
    }
    let said = site.journal();
    ensure!(
        said.contains("accepts the clients of this socket itself socket=unix"),
        "the unix socket is not adopted: {said}"
    );
    Ok(())
}

/// The folder with [`FILES`].
pub(super) fn services(manager: Manager) -> String {
    match manager {
        Manager::System => "/srv/whom".into(),
        Manager::User(user) => format!("/home/{user}/whom"),
    }
}
