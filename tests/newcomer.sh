#!/usr/bin/env bash
# Do the README's commands work on a bare machine? Runs a command in a fresh clone, as a new user.
#
#   tests/newcomer.sh make run                  # in a fresh container of Debian or Ubuntu, as root
#   tests/newcomer.sh --suite trixie make run   # elsewhere, as root: in a bare Debian in a folder
#
# Installs what the README tells users of Debian to install, or what PACKAGES names, and nothing
# else. The user has a clean environment, but for what reaches the package registries. MIRROR names
# another source of Debian. The exit status is the command's. The bare Debian takes debootstrap 1 to
# 4 minutes, and is removed at the end.
set -euo pipefail
project=$(cd "$(dirname "$0")/.." && pwd)
packages=${PACKAGES:-$(grep -om1 'apt install [a-z0-9+. -]*' "$project/README.md" | cut -d' ' -f3-)}
[ "$(id -u)" = 0 ] || { echo "Error: installing packages needs root. Use sudo." >&2; exit 2; }

if [ "${1:-}" = --suite ]; then
  suite=$2 && shift 2
  root=$(mktemp -d) && chmod 755 "$root"  # the user has to enter it
  trap 'umount "$root"/{dev/shm,dev,proc} || true; rm -rf --one-file-system "$root"' EXIT
  debootstrap --variant=minbase --include="ca-certificates,$(tr -s ' ' , <<<"$packages")" \
    "$suite" "$root" ${MIRROR:+"$MIRROR"} >&2
  mount -t proc proc "$root/proc"
  mount --bind /dev "$root/dev"
  mount --bind /dev/shm "$root/dev/shm"
  cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
  cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
else
  root=/
  apt-get -qq update
  # shellcheck disable=SC2086 # several words are several packages
  DEBIAN_FRONTEND=noninteractive apt-get -qq install $packages >&2
fi

chroot "$root" useradd --create-home newcomer
home=$root/home/newcomer
# git clones the project of another user only where its settings allow that; here they are a file.
printf '[safe]\n\tdirectory = *\n' >"$home/allow"
GIT_CONFIG_GLOBAL=$home/allow git clone -q --no-hardlinks "$project" "$home/project"
rm "$home/allow"
chroot "$root" chown -R newcomer: /home/newcomer

reach='SSL_CERT_FILE|SSL_CERT_DIR|REQUESTS_CA_BUNDLE|PIP_CERT|PIP_INDEX_URL|UV_[A-Z_]*INDEX[A-Z_]*'
mapfile -t settings < <(env | grep -E "^($reach|[A-Za-z]+_(proxy|PROXY))=" || true)
settings+=(HOME=/home/newcomer LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin)
chroot --userspec=newcomer:newcomer "$root" env -i "${settings[@]}" \
  bash -c 'cd ~/project && exec "$@"' newcomer "$@"
