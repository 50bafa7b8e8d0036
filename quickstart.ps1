# Take a fresh machine with Windows to generated Japanese: find a Python that can run quickstart.py, which does the rest.
#
#     powershell -ExecutionPolicy Bypass -File quickstart.ps1
$script = Join-Path $PSScriptRoot "quickstart.py"
$encoding, $utf8 = [Console]::OutputEncoding, $env:PYTHONUTF8
try {
    [Console]::OutputEncoding = [System.Text.Encoding]::UTF8
    $env:PYTHONUTF8 = "1"
    foreach ($candidate in "py -3.14", "py -3.13", "py -3.12", "py -3.11", "py -3.10", "python") {
        $program, $version = $candidate -split " "
        $flags = @($version | Where-Object { $_ })
        if (-not (Get-Command $program -ErrorAction SilentlyContinue)) { continue }
        & $program @flags -c "import sys; sys.exit(sys.version_info < (3, 10))" 2>$null
        if ($LASTEXITCODE -ne 0) { continue }
        & $program @flags $script @args
        exit $LASTEXITCODE
    }
    [Console]::Error.WriteLine("error: no Python 3.10 or newer was found; install one (winget install Python.Python.3.13)")
    exit 2
} finally {
    [Console]::OutputEncoding, $env:PYTHONUTF8 = $encoding, $utf8
}
