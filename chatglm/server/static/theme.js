// Runs before the first paint, so that a dark page does not flash white; app.js takes over from here.
try {
  const { theme } = JSON.parse(localStorage.getItem("chatglm.preferences") || "{}");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Nothing readable is stored: the system's colours stay.
}
