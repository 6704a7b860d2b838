#!/usr/bin/env bash
# Brings a data set into data/NAME: from its public home, or from a folder, and checks it either way.
set -euo pipefail

usage() {
    cat <<'END'
usage: scripts/fetch-data.sh NAME [--from DIR] [--to DIR]

  NAME        mnist, fashion-mnist or cifar-10
  --from DIR  take the files, as their public home names them, from DIR and download nothing
  --to DIR    where they go (default: data/NAME)

A broken download goes on where it stopped when the command is run again. Files that are there and right are left alone.
END
}

die() {
    echo "fetch-data: $*" >&2
    exit 1
}

main() {
    local name="" from="" to=""
    while (($#)); do
        case $1 in
        -h | --help) usage && exit 0 ;;
        --from) from=${2:?"--from needs a folder"} && shift ;;
        --to) to=${2:?"--to needs a folder"} && shift ;;
        -*) die "unknown option $1; see --help" ;;
        *)
            [[ -z $name ]] || die "one NAME at a time; see --help"
            name=$1
            ;;
        esac
        shift
    done
    [[ -n $name ]] || { usage >&2 && exit 2; }
    [[ -z $from || -d $from ]] || die "--from $from: no such folder"
    to=${to:-data/$name}

    local files
    files=$(files_of "$name")
    mkdir -p "$to"
    while read -r sum url; do
        obtain "$url" "$sum" "$from" "$to"
    done <<<"$files"
    [[ $name != cifar-10 ]] || unpack_cifar "$to"
    echo "fetch-data: $name is in $to"
}

# Lines of: SHA-256, address. CIFAR-10's home publishes the MD5 c32a1d4ab5d03f1284b67883e8d87530 of the same file.
files_of() {
    local mnist=https://ossci-datasets.s3.amazonaws.com/mnist
    local fashion=https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion
    case $1 in
    mnist)
        echo "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609 $mnist/train-images-idx3-ubyte.gz"
        echo "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c $mnist/train-labels-idx1-ubyte.gz"
        echo "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6 $mnist/t10k-images-idx3-ubyte.gz"
        echo "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6 $mnist/t10k-labels-idx1-ubyte.gz"
        ;;
    fashion-mnist)
        echo "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84 $fashion/train-images-idx3-ubyte.gz"
        echo "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845 $fashion/train-labels-idx1-ubyte.gz"
        echo "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073 $fashion/t10k-images-idx3-ubyte.gz"
        echo "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5 $fashion/t10k-labels-idx1-ubyte.gz"
        ;;
    cifar-10)
        echo "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd" \
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
        ;;
    *) die "unknown set $1; there are mnist, fashion-mnist and cifar-10" ;;
    esac
}

# One file, atomically: it is NAME.part until its checksum is right.
obtain() {
    local url=$1 sum=$2 from=$3 to=$4
    local file=${url##*/}
    if [[ -f $to/$file && $(sha256 "$to/$file") == "$sum" ]]; then
        echo "fetch-data: $file is already there"
        return
    fi
    if [[ -n $from ]]; then
        [[ -f $from/$file ]] || die "$from/$file: no such file"
        cp "$from/$file" "$to/$file.part"
    elif [[ ! -f $to/$file.part || $(sha256 "$to/$file.part") != "$sum" ]]; then
        download "$url" "$to/$file.part"
    fi
    local found
    found=$(sha256 "$to/$file.part")
    if [[ $found != "$sum" ]]; then
        rm "$to/$file.part"
        die "${from:+$from/}$file has the wrong checksum: expected SHA-256 $sum, found $found; it was not kept"
    fi
    mv "$to/$file.part" "$to/$file"
}

# Goes on with what is there of the file. 22 and 33 mean that the server will not: then the next try starts afresh.
download() {
    local url=$1 part=$2 status=0
    echo "fetch-data: $url"
    curl --fail --location --retry 3 --continue-at - --progress-bar --output "$part" "$url" || status=$?
    case $status in
    0) return ;;
    22 | 33) rm -f "$part" ;;
    esac
    die "the download of $url failed (curl $status); run the command again, or give --from"
}

# The six .bin files, out of the folder that the archive has around them.
unpack_cifar() {
    local to=$1
    unpacking=$(mktemp -d "$to/unpacking.XXXXXX")
    trap 'rm -rf "$unpacking"' EXIT
    tar -xzf "$to/cifar-10-binary.tar.gz" -C "$unpacking" --strip-components=1
    mv "$unpacking"/*.bin "$to"
}

# shasum is what macOS has.
sha256() {
    if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi | cut -d ' ' -f 1
}

main "$@"
