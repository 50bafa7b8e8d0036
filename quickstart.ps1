# Take a fresh machine with Windows to generated Japanese: find a Python that can run quickstart.py, which does the rest.
#
#     powershell -ExecutionPolicy Bypass -File quickstart.ps1
$env:PYTHONUTF8 = "1"
[Console]::OutputEncoding = [System.Text.Encoding]::UTF8
$script = Join-Path $PSScriptRoot "quickstart.py"
if (Get-Command py -ErrorAction SilentlyContinue) {
    & py -3 $script @args
} elseif (Get-Command python -ErrorAction SilentlyContinue) {
    & python $script @args
} else {
    [Console]::Error.WriteLine("error: no Python was found; install one (winget install Python.Python.3.13)")
    exit 2
}
exit $LASTEXITCODE
