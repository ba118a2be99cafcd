// The copy button below the Python lines.
element.addEventListener("click", (event) => {
  const button = event.target.closest(".copy");
  if (!button) return;
  const text = element.querySelector(".code pre").textContent;
  navigator.clipboard.writeText(text).then(() => {
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
});
