
# Appended to customize.sh: makes the images that stand in for a registry's, so that what the documentation shows runs as it stands
# there. Each is /srv/images.d/NAME.tar, to be imported, with the lines of a Containerfile in NAME.config: a program of this
# Debian, the libraries it is linked to, and busybox for a shell.
images=$root/srv/images.d
mkdir -p "$images"

# Starts the tree of an image with these programs in it.
begin() {
    tree=$images/tree
    rm -rf "$tree"
    mkdir -p "$tree/bin" "$tree/etc" "$tree/usr/bin" "$tree/usr/sbin" "$tree/var/log" "$tree/var/run" "$tree/run"
    mkdir -m 1777 "$tree/tmp"
    cp "$root/usr/bin/busybox" "$tree/bin/busybox"
    for applet in sh cat ls echo grep head hostname id ip mkdir nc sed sleep su test wget; do
        ln -s busybox "$tree/bin/$applet"
    done
    cp "$root/etc/passwd" "$root/etc/group" "$root/etc/nsswitch.conf" "$tree/etc/"
    ln -s usr/lib "$tree/lib"
    ln -s usr/lib64 "$tree/lib64"
    for program in "$@"; do
        into=$tree/$(dirname "$program")
        mkdir -p "$into"
        cp "$root$program" "$into/"
        libraries=$(chroot "$root" ldd "$program" | sed -n 's/.*=> \(\/[^ ]*\).*/\1/p; s/^[[:space:]]*\(\/lib64[^ ]*\).*/\1/p')
        for library in $libraries; do
            case $library in /usr/*) ;; *) library=/usr$library ;; esac
            mkdir -p "$tree$(dirname "$library")"
            [ -e "$tree$library" ] || cp -L "$root$library" "$tree$library"
        done
    done
}

finish() {
    tar -C "$images/tree" -cf "$images/$1.tar" .
    cat >"$images/$1.config"
    rm -rf "$images/tree"
}

begin /usr/bin/socat
finish socat <<'C'
ENTRYPOINT ["socat"]
C

# As the real image is built, which any client of a published port may use.
begin /usr/bin/redis-server /usr/bin/redis-cli
finish redis <<'C'
CMD ["redis-server", "--save", "", "--protected-mode", "no"]
C

begin /usr/sbin/nginx /usr/bin/curl
mkdir -p "$tree/usr/share/nginx/html" "$tree/etc/nginx/conf.d" "$tree/var/log/nginx" "$tree/var/lib/nginx"
cp "$root/etc/nginx/mime.types" "$tree/etc/nginx/"
cp "$root/usr/share/nginx/html/index.html" "$tree/usr/share/nginx/html/"
cat >"$tree/etc/nginx/nginx.conf" <<'C'
pid /run/nginx.pid;
error_log stderr;
events {}
http {
    include mime.types;
    access_log /dev/stdout;
    include conf.d/*.conf;
}
C
cat >"$tree/etc/nginx/conf.d/default.conf" <<'C'
server {
    listen 80;
    root /usr/share/nginx/html;
}
C
finish nginx <<'C'
CMD ["nginx", "-g", "daemon off;"]
STOPSIGNAL SIGQUIT
EXPOSE 80
C

postgres=$(cd "$root" && echo usr/lib/postgresql/*)
begin "/$postgres/bin/postgres" "/$postgres/bin/initdb" "/$postgres/bin/psql" "/$postgres/bin/pg_isready"
cp -a "$root/$postgres/lib" "$tree/$postgres/"
mkdir -p "$tree/usr/share/postgresql"
cp -a "$root/usr/share/postgresql/${postgres##*/}" "$tree/usr/share/postgresql/"
for program in psql pg_isready; do
    ln -s "/$postgres/bin/$program" "$tree/usr/bin/$program"
done
id=$(sed -n 's/^postgres:[^:]*:\([0-9]*\):\([0-9]*\):.*/\1:\2/p' "$root/etc/passwd")
mkdir -p "$tree/var/lib/postgresql/data" "$tree/var/run/postgresql"
chown "$id" "$tree/var/lib/postgresql/data" "$tree/var/run/postgresql"
chmod 700 "$tree/var/lib/postgresql/data"
cat >"$tree/usr/bin/entrypoint" <<C
#!/bin/sh
# The first start makes the cluster, with the password of the environment, as the real image does.
set -e
export PATH=/$postgres/bin:\$PATH PGDATA=/var/lib/postgresql/data
if [ ! -s \$PGDATA/PG_VERSION ]; then
    echo "\$POSTGRES_PASSWORD" >/tmp/password
    initdb --pwfile=/tmp/password --encoding=UTF8 --locale=C --no-sync >/dev/null
    # Who comes from 127.0.0.1 is trusted; everybody else needs the password.
    echo "host all all all scram-sha-256" >>\$PGDATA/pg_hba.conf
fi
exec "\$@"
C
chmod 755 "$tree/usr/bin/entrypoint"
finish postgres <<'C'
ENTRYPOINT ["entrypoint"]
CMD ["postgres", "-c", "listen_addresses=*"]
USER postgres
STOPSIGNAL SIGINT
EXPOSE 5432
C
